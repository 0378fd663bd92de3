// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"bytes"
	_ "embed"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// The one line of time.Now that is replaced, and by what.
const (
	reads   = "\tsec, nsec, mono := runtimeNow()\n"
	stepped = "\tsec, nsec, mono := steppedNow()\n"
	head    = "\nfunc Now() Time {\n"

	// noPackage ends the names of the files, which are no package of the module around.
	noPackage = ".txt"
)

//go:embed step.go.txt
var step []byte

func main() {
	dir := flag.String("dir", "", "folder for the overlay; created")
	flag.Parse()
	if *dir == "" || flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	name, err := write(*dir)
	if err != nil {
		fmt.Fprintln(os.Stderr, "clockoverlay:", err)
		os.Exit(1)
	}
	fmt.Println(name)
}

// write makes the overlay for the Go that is installed and returns the name of what
// go build wants.
func write(dir string) (name string, err error) {
	root, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		return "", fmt.Errorf("go env GOROOT: %w", err)
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return "", err
	}
	pkg := filepath.Join(string(bytes.TrimSpace(root)), "src", "time")
	source := filepath.Join(pkg, "time.go")
	text, err := os.ReadFile(source)
	if err != nil {
		return "", err
	}
	if text, err = replaced(text); err != nil {
		return "", fmt.Errorf("%s: %w", source, err)
	}
	files := map[string][]byte{"time.go": text, "torture_step.go": step}
	replace := map[string]string{}
	for file := range files {
		replace[filepath.Join(pkg, file)] = filepath.Join(dir, file+noPackage)
	}
	list, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	for file, data := range files {
		if err := os.WriteFile(filepath.Join(dir, file+noPackage), data, 0o644); err != nil {
			return "", err
		}
	}
	name = filepath.Join(dir, "overlay.json")
	return name, os.WriteFile(name, list, 0o644)
}

// replaced is package time's source with another reading of the clock in Now.
func replaced(source []byte) ([]byte, error) {
	if bytes.Count(source, []byte(reads)) != 1 || !bytes.Contains(source, []byte(head+reads)) {
		return nil, errors.New("time.Now does not read the clock by \"sec, nsec, mono := runtimeNow()\" as its first line, and nothing else does; see how this Go reads it, and change internal/torture/clockoverlay")
	}
	return bytes.Replace(source, []byte(reads), []byte(stepped), 1), nil
}
