package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

// formerVersion is how the agents of the former commit call themselves.
const formerVersion = "former"

// TestVersionsSideBySide has agents of the commit before this one beside agents of this one: on the owner, on the next
// owner, and on the pod's node, through moves in both directions, until all are of this one again.
func TestVersionsSideBySide(t *testing.T) {
	former := build(t, "HEAD~1")
	n := newNamespace(t)
	ip, gateway, pod := n.remote("versions", "10.10.0.38")
	node := otherNode(gateway)
	next := otherNode(gateway, node)
	renewAfter(t)
	upgrade := func(node string) {
		t.Helper()
		if err := cluster.Upgrade(t.Context(), node, former); err != nil {
			t.Fatal(err)
		}
		inService(t, node, true)
	}
	move := func(to string) {
		t.Helper()
		t.Log(strings.TrimSpace(egret(t, "move", ip.String(), "--to", to)))
		// an agent that is stopped before it has followed leaves that to the next one
		time.Sleep(300 * time.Millisecond)
	}
	result := probe(t, pod, 28*time.Second, func() {
		upgrade(gateway)
		move(next)
		upgrade(node)
		move(gateway)
		renew(t, gateway)
		upgrade(next)
		move(next)
		move(gateway)
		renew(t, node)
		renew(t, next)
		if _, owner := lookUp(t, "versions"); owner != gateway {
			t.Errorf("the owner is %s, want %s: nothing but the moves moves it", owner, gateway)
		}
	})
	only(t, result, ip)
	lossless(t, "with agents of two versions", result)
}

// renewAfter makes all agents of this version when the test ends.
func renewAfter(t *testing.T) {
	t.Cleanup(func() {
		for _, node := range nodes() {
			renew(t, node)
		}
	})
}

// renew makes a node's agent one of this version.
func renew(t *testing.T, node string) {
	t.Helper()
	for _, f := range []func() error{
		func() error { return cluster.Stop(context.Background(), "agent", node) },
		func() error { return cluster.Start(context.Background(), "agent", node) },
	} {
		if err := f(); err != nil {
			t.Errorf("restarting the agent of %s: %v", node, err)
		}
	}
	inService(t, node, false)
}

// inService waits until a node's agent, of the former version or of this one, is at work.
func inService(t *testing.T, node string, former bool) {
	t.Helper()
	etcd := etcdClient(t)
	eventually(t, 10*time.Second, func() error {
		resp, err := etcd.Get(context.Background(), "/egret/"+store.AgentKey(node))
		if err != nil || len(resp.Kvs) != 1 {
			return fmt.Errorf("the record of the agent of %s: %v, %w", node, resp, err)
		}
		var a egress.Agent
		if err := json.Unmarshal(resp.Kvs[0].Value, &a); err != nil || a.Restarting || (a.Version == formerVersion) != former {
			return fmt.Errorf("the agent of %s: %s, %w", node, resp.Kvs[0].Value, err)
		}
		return nil
	})
}

// build builds the program egret of a commit, or of this one where the history does not go back that far, and returns
// its path.
func build(t *testing.T, commit string) string {
	t.Helper()
	if err := exec.Command("git", "rev-parse", "--verify", "--quiet", commit+"^{commit}").Run(); err != nil {
		t.Logf("this clone has no %s: an agent of HEAD takes its place", commit)
		commit = "HEAD"
	}
	dir := t.TempDir()
	for _, line := range []string{"git -C .. archive -o " + dir + "/tree.tar " + commit, "tar -xf " + dir + "/tree.tar -C " + dir} {
		f := strings.Fields(line)
		if out, err := exec.Command(f[0], f[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", line, err, out)
		}
	}
	program := filepath.Join(dir, "egret")
	cmd := exec.Command("go", "build", "-trimpath", "-tags", "grpcnotrace", "-ldflags", "-s -w -X main.version="+formerVersion, "-o", program, "./cmd/egret")
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building %s: %v\n%s", commit, err, out)
	}
	return program
}
