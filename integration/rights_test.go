package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/integration/lab"
	"github.com/egret-project/egret/store"
)

// All that the other tests see is done by agents that have no more rights than the container of the manifests.
func TestAgentsHaveTheRightsOfTheirContainerAlone(t *testing.T) {
	for _, node := range nodes() {
		hasRights(t, node, lab.AgentCapabilities)
	}
}

// hasRights checks that the agent of a node has these capabilities and no others, by their names, and writes to few
// settings.
func hasRights(t *testing.T, node string, capabilities ...map[string]int) {
	t.Helper()
	want := uint64(0)
	for _, list := range capabilities {
		for _, c := range list {
			want |= 1 << c
		}
	}
	b, err := os.ReadFile(filepath.Join(filepath.Dir(cluster.LogFile("")), "pids", "agent-"+node))
	if err != nil {
		t.Fatal(err)
	}
	pid, _, _ := strings.Cut(string(b), " ")
	// One that has just been started may not be the agent yet.
	eventually(t, 10*time.Second, func() error {
		status, err := os.ReadFile(filepath.Join("/proc", pid, "status"))
		if err != nil {
			return err
		}
		for _, line := range []string{fmt.Sprintf("CapEff:\t%016x", want), fmt.Sprintf("CapBnd:\t%016x", want), "NoNewPrivs:\t1"} {
			if !strings.Contains(string(status), line+"\n") {
				return fmt.Errorf("the agent of %s is not %q:\n%s", node, line, status)
			}
		}
		return nil
	})
	mounts, err := os.ReadFile(filepath.Join("/proc", pid, "mountinfo"))
	if err != nil || !strings.Contains(string(mounts), " /sys /proc/sys ro,") || !strings.Contains(string(mounts), " /sys/net ") {
		t.Errorf("the agent of %s has these mounts, want /proc/sys read-only and /proc/sys/net elsewhere (%v):\n%s", node, err, mounts)
	}
}

// A lab's etcd is without TLS, and agents and crdsync have --insecure.
func TestWhatInsecureAllowedIsReported(t *testing.T) {
	etcd := etcdClient(t)
	for _, node := range nodes() {
		eventually(t, 10*time.Second, func() error { // another test may have stopped it
			resp, err := etcd.Get(context.Background(), "/egret/"+store.AgentKey(node))
			if err != nil || len(resp.Kvs) != 1 {
				return fmt.Errorf("the record of the agent of %s: %v, %w", node, resp, err)
			}
			var a egress.Agent
			if err := json.Unmarshal(resp.Kvs[0].Value, &a); err != nil || !a.Ready || !strings.HasSuffix(a.Exposed, "without TLS") {
				return fmt.Errorf("the agent of %s: %s, %w: want it ready, and that it speaks to etcd without TLS", node, resp.Kvs[0].Value, err)
			}
			return nil
		})
	}
	out, err := cluster.Egret(t.Context(), "status")
	if !strings.Contains(string(out), "noted") || !strings.Contains(string(out), "without TLS, as --insecure allows") {
		t.Errorf("egret status says nothing of it: %v\n%s", err, out)
	}
	out, err = cluster.Egret(t.Context(), "check")
	if err != nil || !strings.Contains(string(out), "etcd-mtls") || !strings.Contains(string(out), "--insecure alone") {
		t.Errorf("egret check says nothing of it: %v\n%s", err, out)
	}
	for _, process := range []string{"crdsync", "agent-node-1"} {
		if log, err := os.ReadFile(cluster.LogFile(process)); err != nil || !strings.Contains(string(log), "etcd is not spoken to by mTLS") {
			t.Errorf("the log of %s does not warn of it (%v)", process, err)
		}
	}
	// Who does not say it does not start.
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	out, err = cluster.Exec(ctx, "node", "node-1", cluster.EgretPath(), "agent", "--node", "node-1", "--endpoints", cluster.AgentEndpoints())
	if err == nil || !strings.Contains(fmt.Sprint(err, string(out)), "without TLS") {
		t.Errorf("an agent without --insecure: %v\n%s", err, out)
	}
}
