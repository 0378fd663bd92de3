// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"bufio"
	"encoding/json"
	"flag"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/muster-vm/muster/api"
)

var update = flag.Bool("update", false, "write the golden files anew")

func TestOpenAPI(t *testing.T) {
	f := newFixture(t)
	a := f.do(call{method: "GET", path: "openapi.json"})
	doc := want[struct {
		OpenAPI    string
		Paths      map[string]map[string]struct{ OperationID string }
		Components struct{ Schemas map[string]json.RawMessage }
	}](t, a, 200)
	var lines []string
	ids := map[string]bool{}
	for path, ops := range doc.Paths {
		for method, op := range ops {
			lines = append(lines, strings.ToUpper(method)+" "+path)
			if ids[op.OperationID] {
				t.Errorf("operation %s is there twice", op.OperationID)
			}
			ids[op.OperationID] = true
		}
	}
	slices.Sort(lines)
	got := strings.Join(lines, "\n") + "\n"
	golden := filepath.Join("testdata", "paths.golden")
	if *update {
		if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if b, err := os.ReadFile(golden); err != nil || string(b) != got {
		t.Errorf("the paths differ from %s (%v); if that is meant, run go test ./rest -update:\n%s", golden, err, got)
	}
	// Every reference leads somewhere.
	for _, m := range regexp.MustCompile(`"#/components/schemas/([^"]+)"`).FindAllStringSubmatch(string(a.body), -1) {
		if _, ok := doc.Components.Schemas[m[1]]; !ok {
			t.Errorf("schema %s is missing", m[1])
		}
	}
	for _, has := range []string{`"enum":["none","restart"]`, `"maximum":255`, `"readOnly":true`, `"openapi":"3.1.0"`} {
		if !strings.Contains(string(a.body), has) {
			t.Errorf("%s is missing", has)
		}
	}
}

func TestEveryCodeHasAStatus(t *testing.T) {
	for _, c := range []api.Code{
		api.CodeInvalid, api.CodeUnauthorized, api.CodeForbidden, api.CodeNotFound, api.CodeExists, api.CodeConflict, api.CodeRefused, api.CodeUnplaceable,
		api.CodeTooLarge, api.CodeNoQuorum, api.CodeNotMember, api.CodeInternal, api.CodeTimeout, api.CodeStorageFull, api.CodeIncomplete, api.CodeChecksum, api.CodeUnsupported,
	} {
		if statuses[c].status == 0 || statuses[c].title == "" {
			t.Errorf("code %s has no status", c)
		}
	}
}

// The TLS port also speaks HTTP/2, which has deadlines and streams of its own.
func TestOverHTTP2(t *testing.T) {
	f := newFixture(t)
	s := f.servers["m1"]
	srv := httptest.NewUnstartedServer(nil)
	srv.Config = s.HTTPServer(s.Handler())
	srv.EnableHTTP2 = true
	srv.StartTLS()
	t.Cleanup(srv.Close)
	do := func(method, path, body string, status int) *http.Response {
		t.Helper()
		r, _ := http.NewRequestWithContext(t.Context(), method, srv.URL+base+path, strings.NewReader(body))
		r.Header.Set("Authorization", "Bearer "+f.tokens[api.RoleAdministrator])
		r.Header.Set("Accept", "text/event-stream")
		resp, err := srv.Client().Do(r)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = resp.Body.Close() })
		if resp.StatusCode != status || resp.ProtoMajor != 2 {
			t.Fatalf("%s %s: %s %s", method, path, resp.Proto, resp.Status)
		}
		return resp
	}
	do("POST", "images", `{"meta":{"name":"deb"}}`, 202)
	do("PUT", "images/deb/content", strings.Repeat("x", 3<<20), 200)
	watch := bufio.NewReader(do("GET", "watch?kinds=vm", "", 200).Body)
	do("POST", "vms", `{"meta":{"name":"a"}}`, 202)
	for {
		line, err := watch.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(line, `"name":"a"`) {
			return
		}
	}
}

func TestConfigIsChecked(t *testing.T) {
	if _, err := New(Config{}); err == nil || !strings.Contains(err.Error(), "Config.Node") {
		t.Error(err)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"meta":{"name":"a"},"spec":{"disks":[{"size":"1G"}],"cpus":1}}`))
	f.Add([]byte(`{"spec":{"memory":"x"}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var vm api.VM
		if err := decode(b, &vm); err != nil && api.CodeOf(err) != api.CodeInvalid {
			t.Errorf("%q: %v", b, err)
		}
	})
}
