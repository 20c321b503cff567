package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/pflag"
)

func flags() *pflag.FlagSet {
	s := pflag.NewFlagSet("", pflag.ContinueOnError)
	s.String("config", "", "")
	s.String("node", "n1", "")
	s.Int("port", 7, "")
	s.Bool("egress.snatFullyRandomPorts", false, "")
	s.StringSlice("egress.exceptCIDRs", []string{"192.0.2.0/24"}, "")
	s.Duration("lease-ttl", 7, "")
	return s
}

// set sets flags by a file, which it writes.
func set(t *testing.T, s *pflag.FlagSet, file, text string) error {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return Set(s, file)
}

func TestAMillionIsANumber(t *testing.T) {
	s := flags()
	if err := set(t, s, filepath.Join(t.TempDir(), "c.yaml"), "port: 1000000"); err != nil || s.Lookup("port").Value.String() != "1000000" {
		t.Errorf("%v, port is %s", err, s.Lookup("port").Value)
	}
}

// Whatever a file has: each name in it is an option, or the whole is at fault.
func FuzzSet(f *testing.F) {
	for _, text := range []string{
		"", "port: 9\nnode: a", "egress: {exceptCIDRs: [10.0.0.0/8, 10.1.0.0/16], snatFullyRandomPorts: true}", "egress: {snatFullyRandomPorts: yes}\negress.snatFullyRandomPorts: no",
		"node: [a, [b, {c: d}]]", "port: 1e400", "port: {}", "lease-ttl: 7s\nlease-ttl: 8s", "config: x", "a: &a [*a]", "egress: {'': 1, '.': 2}", "node: null", "- x", "{", "\x00", "node: \"\\u0000\"",
	} {
		f.Add(text)
	}
	file := filepath.Join(f.TempDir(), "c.yaml")
	f.Fuzz(func(t *testing.T, text string) {
		s := flags()
		if err := s.Set("node", "by the command line"); err != nil {
			t.Fatal(err)
		}
		err := set(t, s, file, text)
		if s.Lookup("config").Changed || s.Lookup("node").Value.String() != "by the command line" {
			t.Errorf("%q: --config is %q, --node %q", text, s.Lookup("config").Value, s.Lookup("node").Value)
		}
		if err != nil {
			return
		}
		s.Visit(func(f *pflag.Flag) {
			last := f.Name[strings.LastIndexByte(f.Name, '.')+1:]
			if f.Name != "node" && !strings.Contains(text, last) && !strings.Contains(text, `\`) {
				t.Errorf("%q: --%s is set", text, f.Name)
			}
		})
	})
}
