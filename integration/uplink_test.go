package integration

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/integration/lab"
)

// The agent follows its uplink: a new link of the same name, and the same link under another name.
func TestUplinkIsMadeAnewUnderTheAgent(t *testing.T) {
	for name, address := range map[string]string{"4": "10.10.0.36", "6": "fd10::36"} {
		t.Run(name, func(t *testing.T) {
			n := newNamespace(t)
			ip, gateway, pod := n.remote("uplink-"+name, address)
			for _, step := range []struct {
				name   string
				change func(context.Context) error
			}{
				{"made anew", func(ctx context.Context) error { return cluster.Replug(ctx, gateway) }},
				{"renamed", func(ctx context.Context) error { return rename(ctx, gateway, "eth0", "up0") }},
				{"renamed back", func(ctx context.Context) error { return rename(ctx, gateway, "up0", "eth0") }},
			} {
				result := probeTo(t, outsideOf(ip), pod, 5*time.Second, func() {
					if err := step.change(t.Context()); err != nil {
						t.Fatal(err)
					}
				})
				only(t, result, ip)
				t.Logf("%s: longest gap %v", step.name, result.LongestGap)
				if result.LongestGap > 2*time.Second {
					t.Errorf("%s: %v without an answer, want at most 2s", step.name, result.LongestGap)
				}
				// The node itself serves again, to a neighbour that knows nothing.
				if _, owner := held(t, "uplink-"+name); owner != gateway {
					egret(t, "move", ip.String(), "--to", gateway)
				}
				if out, err := cluster.Exec(t.Context(), "outside", "", "ip", "neigh", "flush", "dev", "eth0"); err != nil {
					t.Fatalf("%v\n%s", err, out)
				}
				leavesAs(t, pod, ip)
				result = probeTo(t, outsideOf(ip), pod, time.Second, func() {})
				lossless(t, step.name+", afterwards", result)
			}
		})
	}
}

// rename gives a node's link to the LAN another name, and what the kernel forgets of it then.
func rename(ctx context.Context, node, from, to string) error {
	n, err := cluster.NodeNumber(node)
	if err != nil {
		return err
	}
	lines := []string{"ip link set " + from + " down", "ip link set " + from + " name " + to, "ip link set " + to + " up"}
	for _, ip := range lab.NodeIPs(n) {
		if ip.Is6() {
			lines = append(lines, fmt.Sprintf("ip addr add %s/64 dev %s nodad", ip, to))
		}
	}
	for _, via := range []netip.Addr{lab.OutsideLAN, netip.MustParseAddr("fd10::200")} {
		lines = append(lines, fmt.Sprintf("ip route replace default via %s dev %s", via, to))
	}
	for i := 1; i <= 3; i++ {
		if i == n {
			continue
		}
		for _, ip := range lab.NodeIPs(i) {
			cidr := fmt.Sprintf("10.244.%d.0/24", i)
			if ip.Is6() {
				cidr = fmt.Sprintf("fd44:%d::/64", i)
			}
			lines = append(lines, fmt.Sprintf("ip route replace %s via %s dev %s", cidr, ip, to))
		}
	}
	for _, line := range lines {
		if out, err := cluster.Exec(ctx, "node", node, strings.Fields(line)...); err != nil {
			return fmt.Errorf("%s: %w\n%s", line, err, out)
		}
	}
	return nil
}
