package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/etcdtest"
	"github.com/egret-project/egret/internal/tarball"
	"github.com/egret-project/egret/store"
)

func TestBundleIsAFileForItsOwnerAlone(t *testing.T) {
	server := etcdtest.New(t)
	c := dialed(t, server.Endpoint(), "")
	records(t, c, map[string]any{store.NodeKey("node-1"): egress.Node{Name: "node-1", Index: 1}, store.CordonKey("node-1"): egress.Cordon{Node: "node-1", Why: "the password is hunter22"}})
	t.Chdir(t.TempDir())
	at := []string{"bundle", "--node=false", "--endpoints", server.Endpoint()}
	t.Setenv("ETCDCTL_PASSWORD", "hunter22") // without a user it is not used
	out, err := run(t, append(at, "-o", "a.tar.gz")...)
	if err != nil || !strings.HasPrefix(out, "a.tar.gz: ") {
		t.Fatalf("%v\n%s", err, out)
	}
	info, err := os.Stat("a.tar.gz")
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v: want mode 0600", info.Mode(), err)
	}
	f, err := os.Open("a.tar.gz")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	files := tarball.Files(t, f, "egret-bundle/", nil)
	if !strings.Contains(files["records/nodes.jsonl"], `"node-1"`) || !strings.Contains(files["records/cordons.jsonl"], "the password is (hidden)") || strings.Contains(files["manifest.json"], "hunter22") {
		t.Errorf("%v", files)
	}
	for name := range files {
		if strings.HasPrefix(name, "node/") {
			t.Errorf("%s, with --node=false", name)
		}
	}
	var stdout, stderr bytes.Buffer
	r := root()
	r.SetArgs(append(at, "-o", "-"))
	r.SetOut(&stdout)
	r.SetErr(&stderr)
	if err := r.ExecuteContext(t.Context()); err != nil || stderr.Len() > 0 || len(tarball.Files(t, &stdout, "egret-bundle/", nil)) != len(files) {
		t.Errorf("to the standard output: %v, %s", err, stderr.String())
	}
	if out, err := run(t, at...); err != nil || !strings.HasPrefix(out, "egret-bundle-20") {
		t.Errorf("without a name: %v, %s", err, out)
	}
	_, terminal := terminal(t)
	r = root()
	r.SetArgs(append(at, "-o", "-"))
	r.SetOut(terminal)
	if err := r.ExecuteContext(t.Context()); err == nil || !strings.Contains(err.Error(), "is a terminal") {
		t.Errorf("to a terminal: %v", err)
	}
}

// What is there stays, and where there is no archive there is no file.
func TestBundleOverwritesNothingAndLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	if err := errors.Join(os.WriteFile("there", []byte("mine"), 0o644), os.Symlink("there", "link"), os.Symlink("nowhere", "dangling")); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		output, want string
		more         []string
	}{
		"a file that is there":          {"there", "nothing is overwritten", nil},
		"a link to one":                 {"link", "nothing is overwritten", nil},
		"a link to nothing":             {"dangling", "nothing is overwritten", nil},
		"a folder":                      {dir, "nothing is overwritten", nil},
		"no such folder":                {"none/x", "no such file", nil},
		"etcd does not answer":          {"new", "nothing could be collected", nil},
		"redacted, without etcd":        {"new", "--redact", []string{"--redact"}},
		"no time":                       {"new", "--timeout", []string{"--timeout", "0s"}},
		"a node's address that is none": {"new", "--node-ip", []string{"--node-ip", "x"}},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := run(t, append([]string{"bundle", "--node=false", "--endpoints", "127.0.0.1:1", "--dial-timeout", "200ms", "-o", tt.output}, tt.more...)...)
			if err == nil || !strings.Contains(err.Error(), tt.want) || exitStatus(err) != 1 {
				t.Errorf("%v, exit status %d, %s; want %q", err, exitStatus(err), out, tt.want)
			}
		})
	}
	left, err := filepath.Glob("*")
	if b, rerr := os.ReadFile("there"); err != nil || rerr != nil || string(b) != "mine" || strings.Join(left, " ") != "dangling link there" {
		t.Errorf("left are %q, %q", left, b)
	}
}

func TestABundleThatIsNotWholeSaysSoByItsExitStatus(t *testing.T) {
	server := etcdtest.New(t)
	records(t, dialed(t, server.Endpoint(), ""), map[string]any{store.PoolKey("broken"): "no JSON", store.NodeKey("node-1"): egress.Node{Name: "node-1", Index: 1}})
	t.Chdir(t.TempDir())
	out, err := run(t, "bundle", "--node=false", "--endpoints", server.Endpoint(), "-o", "a")
	if err == nil || exitStatus(err) != 3 || !strings.Contains(out, "tables/pools.txt: record pools/broken could not be read") {
		t.Errorf("%v, exit status %d\n%s", err, exitStatus(err), out)
	}
	if _, err := os.Stat("a"); err != nil {
		t.Error(err)
	}
}
