package integration

import (
	"context"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/egret-project/egret/integration/lab"
)

func TestCleanupLeavesANodeAsItWasBeforeTheAgent(t *testing.T) {
	ctx := t.Context()
	l, err := lab.Up(ctx, lab.Config{Name: lab.OwnName("e2e-cleanup"), Nodes: 2, LeaseTTL: leaseTTL, Bare: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Down(context.Background()); err != nil {
			t.Error(err)
		}
	})
	shared := cluster
	cluster = l
	defer func() { cluster = shared }()
	n := &namespace{t: t, name: "cleanup"}
	both := []string{"node-1", "node-2"}
	pods, before := map[string]string{}, map[string][]string{}
	for _, node := range both {
		pods[node] = n.pod("web-"+node, node, "web")
		for _, line := range alike {
			if out, err := l.Exec(ctx, "node", node, strings.Fields(line)...); err != nil {
				t.Fatalf("%s: %v\n%s", line, err, out)
			}
		}
	}
	for _, node := range both {
		before[node] = everything(t, node)
	}
	start := func(what, node string) {
		t.Helper()
		if err := l.Start(ctx, what, node); err != nil {
			t.Fatal(err)
		}
	}
	start("crdsync", "")
	for range 2 { // also after an agent has made everything anew
		for _, node := range both {
			start("agent", node)
		}
		n.dual("both", "10.10.0.30", "fd10::30")
		ips := bothIPs(t, "both")
		for _, pod := range pods {
			for _, ip := range ips {
				leavesAs(t, pod, ip)
			}
		}
		for _, node := range both {
			if out, err := l.Exec(ctx, "node", node, l.EgretPath(), "cleanup"); err == nil || !strings.Contains(err.Error(), "stop it first") {
				t.Errorf("while the agent runs: %v\n%s\nwant an error that says what to do", err, out)
			}
		}
		for _, ip := range ips {
			leavesAs(t, pods["node-1"], ip)
		}
		for _, node := range both {
			if err := l.Stop(ctx, "agent", node); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if out, err := l.Exec(ctx, "node", node, l.EgretPath(), "cleanup"); err != nil {
					t.Fatalf("%v\n%s", err, out)
				}
			}
			if diff := cmp.Diff(before[node], everything(t, node)); diff != "" {
				t.Errorf("%s (-before the agent +after the cleanup):\n%s", node, diff)
			}
			out, err := l.Exec(ctx, "node", node, "sh", "-c", "conntrack -L -m 0x0e9e0000/0xffffe000; conntrack -L -f ipv6 -m 0x0e9e0000/0xffffe000")
			if err != nil || len(out) > 0 {
				t.Errorf("connections of %s: %v\n%s", node, err, out)
			}
		}
		for i, node := range both {
			for _, own := range lab.NodeIPs(i + 1) {
				leavesAs(t, pods[node], own)
			}
		}
	}
}

// alike are what others have and could be taken for ours: same priorities, tables, names that begin alike.
var alike = []string{
	"nft add table inet egretta", "nft add table ip egret", "nft add chain ip egret prerouting { type filter hook prerouting priority -90 ; }",
	"ip rule add pref 1100 fwmark 0x1 lookup 7000", "ip rule add pref 1999 from 192.0.2.1 lookup 7001",
	"ip -6 rule add pref 1200 fwmark 0x1 lookup 7001 protocol 95",
	"ip route add 192.0.2.0/24 via 10.10.0.200 table 7000", "ip -6 route add 2001:db8:7::/64 via fd10::200 table 7001 proto 95",
	"ip route add 192.0.2.0/24 via 10.10.0.200 table 6999 proto 94", "ip rule add pref 2000 fwmark 0x1 lookup 6999 protocol 94",
	"ip -6 neigh add proxy fd10::250 dev eth0", "ip link add egret1 type bridge", "ip addr add 192.0.2.9/32 dev egret1",
}

// moody is what ip prints of the kernel's own doing: how long something lasts, and what a link has seen.
var moody = regexp.MustCompile(` (expires|valid_lft|preferred_lft) \S+|\b\w+_timer +\S+`)

// everything returns what a node has of rules, routes, links, addresses, nftables and settings, whoever made it.
func everything(t *testing.T, node string) []string {
	t.Helper()
	var all []string
	for _, line := range []string{
		"ip rule", "ip -6 rule", "ip route show table all", "ip -6 route show table all", "ip -d link", "ip addr", "ip neigh show nud permanent",
		"ip -6 neigh show proxy", "sysctl -a --pattern net.ipv6.neigh.*proxy_delay",
		"bridge fdb show", "nft list ruleset", "sysctl -a --pattern net.ipv[46].conf",
	} {
		out, err := cluster.Exec(t.Context(), "node", node, strings.Fields(line)...)
		if err != nil {
			t.Fatalf("%s: %v\n%s", line, err, out)
		}
		all = append(all, strings.Split(moody.ReplaceAllString(stable(string(out)), ""), "\n")...)
	}
	return all
}
