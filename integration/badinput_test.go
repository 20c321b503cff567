package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestKernelThatLacksSomethingIsNamed(t *testing.T) {
	// Without the capability the kernel refuses what it would refuse for want of the feature: the agent has to say
	// which, and end.
	egretPath, endpoint := cluster.EgretPath(), cluster.AgentEndpoints()
	if err := cluster.Stop(t.Context(), "agent", "node-3"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	out, err := cluster.Exec(ctx, "node", "node-3", "setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin",
		egretPath, "agent", "--node", "node-3", "--endpoints", endpoint, "--insecure")
	if err == nil || !strings.Contains(fmt.Sprint(err, string(out)), "CAP_NET_ADMIN") {
		t.Errorf("an agent without CAP_NET_ADMIN: %v\n%s\nwant an error that names it", err, out)
	}
	renew(t, "node-3") // and in service: else the second would be the first
	out, err = cluster.Exec(ctx, "node", "node-3", egretPath, "agent", "--node", "node-3", "--endpoints", endpoint, "--insecure")
	if err == nil || !strings.Contains(fmt.Sprint(err, string(out)), "another egret agent") {
		t.Errorf("a second agent on the node: %v\n%s\nwant an error that says so", err, out)
	}
}

func TestRecordThatDoesNotParseIsNamedAndTheOthersServed(t *testing.T) {
	n := newNamespace(t)
	ip, gateway, _ := n.remote("bad", "10.10.0.41")
	etcd := etcdClient(t)
	const key = "/egret/owners/10.10.0.42"
	if _, err := etcd.Put(t.Context(), key, "nobody"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := etcd.Delete(context.Background(), key); err != nil {
			t.Error(err)
		}
	})
	for _, node := range nodes() {
		eventually(t, 5*time.Second, func() error {
			log, err := os.ReadFile(cluster.LogFile("agent-" + node))
			if err != nil || !bytes.Contains(log, []byte("owners/10.10.0.42")) {
				return fmt.Errorf("the agent of %s does not name the record in its log (%v)", node, err)
			}
			return nil
		})
	}
	selected(t, n.pod("late", gateway, "web"), ip)
	out, err := cluster.Egret(t.Context(), "get", "owners")
	if err == nil || !strings.Contains(err.Error()+string(out), "owners/10.10.0.42") || !bytes.Contains(out, []byte(ip.String())) {
		t.Errorf("egret get owners: %v\n%s\nwant the other owners, and an error that names the record", err, out)
	}
}

// TestANodeThatCannotProgramIsNamedUntilItCan takes the name of the agent's link on a gateway: somebody else's link is
// never touched.
func TestANodeThatCannotProgramIsNamedUntilItCan(t *testing.T) {
	n := newNamespace(t)
	ip, gateway, _ := n.remote("faulty", "10.10.0.96")
	describe := func() (string, error) {
		out, err := cluster.Kubectl(t.Context(), "describe", "egress", "faulty")
		return string(out), err
	}
	run := func(line string) error {
		_, err := cluster.Exec(t.Context(), "node", gateway, "sh", "-c", line)
		return err
	}
	t.Cleanup(func() { // fails when the test has done it
		_, _ = cluster.Exec(context.Background(), "node", gateway, "ip", "link", "del", "theirs")
	})
	if err := cluster.Freeze(t.Context(), gateway); err != nil { // it makes its link anew faster than anybody could
		t.Fatal(err)
	}
	err := run("ip link del egret0 && ip link add egret0 type veth peer name theirs")
	if err := errors.Join(err, cluster.Thaw(t.Context(), gateway)); err != nil {
		t.Fatal(err)
	}
	eventually(t, 10*time.Second, func() error {
		out, err := describe()
		for _, part := range []string{"Degraded", "ProgrammingError", "node " + gateway + ": addresses: ", "egret0 is a link of type veth, not ours: remove or rename it", "Warning"} {
			if err == nil && !strings.Contains(out, part) {
				err = fmt.Errorf("kubectl describe does not say %q:\n%s", part, out)
			}
		}
		return err
	})
	if err := run("ip -d link show egret0 | grep -q veth"); err != nil {
		t.Errorf("somebody else's link: %v", err)
	}
	if err := run("ip link del theirs"); err != nil {
		t.Fatal(err)
	}
	eventually(t, 10*time.Second, func() error {
		out, err := describe()
		conditions, _, _ := strings.Cut(out, "Events:")
		if err == nil && strings.Contains(conditions, "Degraded") {
			err = fmt.Errorf("it is mended, and kubectl describe says:\n%s", out)
		}
		return err
	})
	eventually(t, 5*time.Second, func() error { return run("ip address show dev egret0 | grep -q " + ip.String() + "/") })
	selected(t, n.pod("late", gateway, "web"), ip)
}

func TestWhatOthersHaveInReservedPlacesIsReportedAtStart(t *testing.T) {
	const node = "node-2"
	on := func(lines ...string) {
		t.Helper()
		for _, line := range lines {
			if out, err := cluster.Exec(context.Background(), "node", node, strings.Fields(line)...); err != nil {
				t.Errorf("%s: %v\n%s", line, err, out)
			}
		}
	}
	on("ip rule add pref 1500 fwmark 0x10/0xff lookup main", "nft add table ip theirs", "nft add chain ip theirs marks",
		"nft add rule ip theirs marks meta mark set 0x10", "nft add rule ip theirs marks ct mark set 0x10")
	t.Cleanup(func() { on("ip rule del pref 1500", "nft delete table ip theirs") })
	before, err := os.ReadFile(cluster.LogFile("agent-" + node))
	if err != nil {
		t.Fatal(err)
	}
	restart(t, node)
	for _, want := range []string{
		`name=rule-priorities found="also used by rule 1500"`, `name=packet-mark found="also used by chain ip theirs marks; rule 1500 fwmark 0x10/0xff"`,
		`name=conn-mark found="also used by chain ip theirs marks"`,
	} {
		eventually(t, 5*time.Second, func() error {
			log, err := os.ReadFile(cluster.LogFile("agent-" + node))
			if err == nil && !bytes.Contains(log[min(len(before), len(log)):], []byte(want)) {
				err = fmt.Errorf("the agent does not log %s", want)
			}
			return err
		})
	}
}

// What a user writes by mistake is refused while they look, and not found in a condition later.
func TestAMistakeIsRefusedWhenItIsWritten(t *testing.T) {
	n := newNamespace(t)
	pool := func(name, cidr string) map[string]any {
		return map[string]any{"apiVersion": "crd.antrea.io/v1beta1", "kind": "ExternalIPPool", "metadata": n.meta(name),
			"spec": map[string]any{"ipRanges": []any{map[string]any{"cidr": cidr}}, "nodeSelector": map[string]any{}}}
	}
	n.apply(pool("taken", "192.0.2.16/28"))
	for _, tt := range []struct {
		object map[string]any
		want   string
	}{
		{pool("overlaps", "192.0.2.24/29"), "ipRanges: 192.0.2.24/29 overlaps with another pool: want each address in one pool"},
		{map[string]any{"apiVersion": "crd.antrea.io/v1beta1", "kind": "Egress", "metadata": n.meta("outside"), "spec": map[string]any{
			"externalIPPool": "taken", "egressIP": "192.0.2.16", "appliedTo": map[string]any{}}},
			"egressIP 192.0.2.16 is not an address of pool taken: want a pool that has it, or no egressIP; `kubectl get externalippools -o yaml` has their ranges"},
	} {
		b, err := json.Marshal(tt.object)
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(t.TempDir(), "object.json")
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := cluster.Kubectl(t.Context(), "apply", "--dry-run=server", "-f", path)
		if err == nil || !strings.Contains(err.Error()+string(out), "denied the request: "+tt.want) {
			t.Errorf("got %v\n%s\nwant it denied: %s", err, out, tt.want)
		}
	}
}
