// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"sigs.k8s.io/yaml"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	vswitch "github.com/muster-vm/muster/switch"
)

// Defaults of Config.
const (
	DefaultDataDir = "/var/lib/muster"
	DefaultRunDir  = "/run/muster"
	DefaultListen  = "0.0.0.0:7600"
	defaultQEMU    = "qemu-system-x86_64"
	defaultImgTool = "qemu-img"
)

// Config is everything that can be set for a daemon, from its file and its
// flags. Cluster-wide settings are objects in the database, not here.
type Config struct {
	// DataDir holds this node's replica, keys and local pool.
	DataDir string `json:"dataDir"`
	// RunDir holds sockets and must be short: a socket's path has at most 107
	// bytes. Default: /run/muster, or /run/muster-<hash> for another DataDir.
	RunDir string `json:"runDir"`
	// Listen is the one port, host:port: TCP, and UDP for gossip.
	Listen string `json:"listen"`
	// Advertise is the host:port that others use; default: Listen, or this
	// host's first global address when Listen names none.
	Advertise string `json:"advertise"`
	// NodeName is a DNS label; default: the host name up to its first dot.
	NodeName string `json:"nodeName"`
	// QEMU, QEMUImg and Guard are the programs to run.
	QEMU    string `json:"qemu"`
	QEMUImg string `json:"qemuImg"`
	Guard   string `json:"guard"`
	// VMUsers are user ids that VMs run as, FIRST-LAST: the first is the number of
	// their common group, the others are one for each running VM. "off" lets VMs
	// run as the user of musterd.
	VMUsers string `json:"vmUsers"`
	// Watchdog is auto, none or the path of the device.
	Watchdog string `json:"watchdog"`
	// OVSDB is the endpoint of Open vSwitch's database, unix:PATH; default:
	// where Debian's package has it.
	OVSDB string `json:"ovsdb"`
	// SNMPListen is the UDP host:port of the SNMP agent; none when empty. With it
	// goes a community (v2c), or a user and pass phrase (v3), or both. The two
	// secrets may be in files of their own, of which the first line counts.
	SNMPListen        string `json:"snmpListen"`
	SNMPCommunity     string `json:"snmpCommunity,omitempty"`
	SNMPCommunityFile string `json:"snmpCommunityFile,omitempty"`
	SNMPUser          string `json:"snmpUser"`
	SNMPSecret        string `json:"snmpSecret,omitempty"`
	SNMPSecretFile    string `json:"snmpSecretFile,omitempty"`
	// RebootCommand and ShutdownCommand reboot this host and switch it off, for
	// muster node reboot and shutdown: a program and its arguments, separated by
	// blanks. Default: systemctl reboot, systemctl poweroff.
	RebootCommand   string `json:"rebootCommand"`
	ShutdownCommand string `json:"shutdownCommand"`
	// BootIDFile names the boot that the host runs, instead of the kernel; for tests.
	BootIDFile string `json:"bootIDFile,omitempty"`
	// LogStore is where the configuration database keeps its Raft log: segments
	// (default) or boltdb. It may be changed while the daemon is stopped.
	LogStore string `json:"logStore"`
	// LogLevel is debug, info, warn or error.
	LogLevel string `json:"logLevel"`
}

// LoadFile reads a configuration file (YAML) over what c already says.
func (c *Config) LoadFile(path string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("configuration file: %w", err)
	}
	if err := yaml.UnmarshalStrict(bytes.TrimSpace(b), c); err != nil {
		return fmt.Errorf("configuration file %s: %w", path, err)
	}
	return nil
}

// Complete fills the defaults and validates.
func (c *Config) Complete() error {
	def := func(s *string, v string) {
		if *s == "" {
			*s = v
		}
	}
	def(&c.DataDir, DefaultDataDir)
	dir, err := filepath.Abs(c.DataDir)
	if err != nil {
		return fmt.Errorf("data directory: %w", err)
	}
	c.DataDir = dir
	def(&c.RunDir, defaultRunDir(dir))
	def(&c.Listen, DefaultListen)
	def(&c.QEMU, defaultQEMU)
	def(&c.QEMUImg, defaultImgTool)
	def(&c.Watchdog, "auto")
	def(&c.VMUsers, DefaultVMUsers)
	def(&c.LogLevel, "info")
	def(&c.RebootCommand, "systemctl reboot")
	def(&c.ShutdownCommand, "systemctl poweroff")
	def(&c.LogStore, configdb.LogSegments)
	if c.LogStore != configdb.LogSegments && c.LogStore != configdb.LogBolt {
		return fmt.Errorf("logStore: %q is not known; give %s or %s", c.LogStore, configdb.LogSegments, configdb.LogBolt)
	}
	if c.NodeName == "" {
		host, err := os.Hostname()
		if err != nil {
			return fmt.Errorf("host name: %w", err)
		}
		c.NodeName, _, _ = strings.Cut(strings.ToLower(host), ".")
	}
	if err := api.ValidName("nodeName", c.NodeName); err != nil {
		return fmt.Errorf("%w; set it with --node-name", err)
	}
	if c.Guard == "" {
		c.Guard = findGuard()
	}
	if _, err := c.Level(); err != nil {
		return err
	}
	if _, _, err := parseUsers(c.VMUsers); err != nil {
		return err
	}
	if !filepath.IsAbs(c.RunDir) {
		return fmt.Errorf("runDir: %q must be absolute", c.RunDir)
	}
	if c.OVSDB != "" {
		// The switch would say so only when the node becomes a member.
		if err := vswitch.CheckOVSDB(c.OVSDB); err != nil {
			return err
		}
	}
	if err := c.completeSNMP(); err != nil {
		return err
	}
	return c.completeAddress()
}

// minSNMPSecret is the shortest pass phrase (RFC 3414 section 11.2), and
// maxSecretFile the largest file with one, in bytes.
const (
	minSNMPSecret = 8
	maxSecretFile = 4096
)

// completeSNMP reads the secrets of the agent and checks that it is whole.
func (c *Config) completeSNMP() error {
	if err := readSecret(&c.SNMPCommunity, c.SNMPCommunityFile, "snmpCommunity"); err != nil {
		return err
	}
	if err := readSecret(&c.SNMPSecret, c.SNMPSecretFile, "snmpSecret"); err != nil {
		return err
	}
	switch {
	case c.SNMPListen == "" && (c.SNMPCommunity != "" || c.SNMPUser != ""):
		return errors.New("snmpListen: is missing; without it the SNMP agent is off, and snmpCommunity and snmpUser have no meaning")
	case c.SNMPListen == "":
		return nil
	case c.SNMPCommunity == "" && c.SNMPUser == "":
		return errors.New("snmpCommunity: is missing; the SNMP agent needs it for v2c, or snmpUser and snmpSecretFile for v3")
	case c.SNMPUser != "" && len(c.SNMPSecret) < minSNMPSecret:
		return fmt.Errorf("snmpSecret: the pass phrase of user %s needs at least %d characters", c.SNMPUser, minSNMPSecret)
	}
	_, _, err := splitHostPort("snmpListen", c.SNMPListen)
	return err
}

// readSecret reads the first line of a file, if one is named.
func readSecret(secret *string, file, field string) error {
	if file == "" {
		return nil
	}
	if *secret != "" {
		return fmt.Errorf("%sFile: %s is given as well; choose one", field, field)
	}
	f, err := os.Open(file)
	if err != nil {
		return fmt.Errorf("%sFile: %w", field, err)
	}
	defer func() { _ = f.Close() }()
	b, err := io.ReadAll(io.LimitReader(f, maxSecretFile))
	if err != nil {
		return fmt.Errorf("%sFile: %w", field, err)
	}
	*secret, _, _ = strings.Cut(string(b), "\n")
	*secret = strings.TrimSuffix(*secret, "\r")
	if *secret == "" {
		return fmt.Errorf("%sFile: the first line of %s is empty", field, file)
	}
	return nil
}

// hiddenSecret stands for a secret where the configuration is shown.
const hiddenSecret = "(not shown)"

// Show returns the configuration as YAML, without its secrets.
func (c *Config) Show() (string, error) {
	shown := *c
	for _, s := range []struct {
		secret *string
		file   string
	}{{&shown.SNMPCommunity, c.SNMPCommunityFile}, {&shown.SNMPSecret, c.SNMPSecretFile}} {
		switch {
		case s.file != "": // it says where it comes from
			*s.secret = ""
		case *s.secret != "":
			*s.secret = hiddenSecret
		}
	}
	b, err := yaml.Marshal(&shown)
	return string(b), err
}

func (c *Config) completeAddress() error {
	host, port, err := splitHostPort("listen", c.Listen)
	if err != nil {
		return err
	}
	if c.Advertise == "" {
		if host == "" || net.ParseIP(host).IsUnspecified() {
			if host, err = firstAddress(); err != nil {
				return err
			}
		}
		c.Advertise = net.JoinHostPort(host, port)
	}
	host, _, err = splitHostPort("advertise", c.Advertise)
	if err != nil {
		return err
	}
	if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() {
		return fmt.Errorf("advertise: %s is no address that others can reach; give this host's own", c.Advertise)
	}
	return nil
}

func splitHostPort(field, s string) (host, port string, err error) {
	host, port, err = net.SplitHostPort(s)
	if err != nil {
		return "", "", fmt.Errorf("%s: %q is not host:port, such as 10.0.0.1:7600", field, s)
	}
	if n, err := strconv.Atoi(port); err != nil || n < 1 || n > 65535 {
		return "", "", fmt.Errorf("%s: port %q is not a number from 1 to 65535", field, port)
	}
	return host, port, nil
}

func firstAddress() (string, error) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return "", fmt.Errorf("addresses of this host: %w", err)
	}
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok && n.IP.IsGlobalUnicast() {
			return n.IP.String(), nil
		}
	}
	return "", errors.New("this host has no address that others can reach; set one with --listen ADDR:PORT")
}

// defaultRunDir is short, and different for every data directory.
func defaultRunDir(dataDir string) string {
	if dataDir == DefaultDataDir {
		return DefaultRunDir
	}
	sum := sha256.Sum256([]byte(dataDir))
	return DefaultRunDir + "-" + hex.EncodeToString(sum[:4])
}

// findGuard looks beside this program first, then in PATH.
func findGuard() string {
	const name = "muster-guard"
	if self, err := os.Executable(); err == nil {
		p := filepath.Join(filepath.Dir(self), name)
		if st, err := os.Stat(p); err == nil && st.Mode().IsRegular() {
			return p
		}
	}
	if p, err := exec.LookPath(name); err == nil {
		return p
	}
	return name
}

// Level returns the log level.
func (c *Config) Level() (slog.Level, error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(c.LogLevel)); err != nil {
		return 0, fmt.Errorf("logLevel: %q is not debug, info, warn or error", c.LogLevel)
	}
	return l, nil
}
