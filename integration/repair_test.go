package integration

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/integration/lab"
)

// shareTables starts a node's agent again, until the test's end, so that others can break its nftables tables.
func shareTables(t *testing.T, node string) {
	t.Helper()
	shared := t.TempDir() + "/egret"
	if err := os.WriteFile(shared, fmt.Appendf(nil, "#!/bin/sh\nexec %s \"$@\" --share-tables\n", cluster.EgretPath()), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := cluster.Upgrade(t.Context(), node, shared); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cluster.Stop(context.Background(), "agent", node); err != nil {
			t.Error(err)
		}
		if err := cluster.Start(context.Background(), "agent", node); err != nil {
			t.Error(err)
		}
	})
	eventually(t, 10*time.Second, func() error {
		if out, err := cluster.Exec(t.Context(), "node", node, "nft", "add", "table", "inet", "egret"); err != nil {
			return fmt.Errorf("table inet egret is still owned: %w\n%s", err, out)
		}
		return nil
	})
}

// passing is what is printed that another has in its place: the number of a link, its queue once it was up, and how
// long a permit is.
var passing = regexp.MustCompile(`(?m)^\d+: |qdisc \S+|timeout \S+|(?s:^\tset (?:heard|came)[46] \{.*?^\t\}\n)`)

// TestWhatIsDeletedOrChangedByHandComesBack harms every kind of object that is Egret's. In the commands, MARK is the
// routing mark toward gateways and TABLE its table, NUMBER the gateway's and OWN the pod's node's, IP4 and IP6 are the
// egress IPs, POD4 and POD6 the pod's.
func TestWhatIsDeletedOrChangedByHandComesBack(t *testing.T) {
	n := newNamespace(t)
	n.dual("repair", "10.10.0.16", "fd10::16")
	ips := bothIPs(t, "repair")
	_, gateway := held(t, "repair")
	node := otherNode(gateway)
	pod, err := cluster.Pod(t.Context(), lab.PodConfig{Name: n.name + "/web", Node: node, Labels: map[string]string{"app": "web"}})
	if err != nil {
		t.Fatal(err)
	}
	n.pods = append(n.pods, pod.Name)
	selected(t, pod.Name, ips...)
	number, own := gateway[len("node-"):], node[len("node-"):]
	words := strings.NewReplacer("MARK", fmt.Sprint(egress.ToGatewayMark), "TABLE", fmt.Sprint(egress.ToGatewayMark.Table()),
		"NUMBER", number, "OWN", own, "IP4", ips[0].String(), "IP6", ips[1].String(), "POD4", pod.IPs[0].String(), "POD6", pod.IPs[1].String(),
		"MAC", egress.OverlayMAC(netip.MustParseAddr("10.10.0.10"+number)).String())

	// Of a command that begins with "ip FAMILY" there is one for each.
	tests := []struct{ name, node, breaks, shows string }{
		{"the rule of the way to gateways", node, "ip FAMILY rule del pref 1200", "ip FAMILY rule"},
		{"the rule of the way to gateways is another", node, "ip FAMILY rule del pref 1200; ip FAMILY rule add pref 1200 fwmark MARK/0x83fff lookup main protocol 94", "ip FAMILY rule"},
		{"a rule too many", node, "ip FAMILY rule add pref 1150 lookup main protocol 94", "ip FAMILY rule"},
		{"the guard", node, "ip FAMILY rule del pref 1003", "ip FAMILY rule"},
		{"the guard leads elsewhere", node, "ip FAMILY rule del pref 1003; ip FAMILY rule add pref 1003 lookup main protocol 94", "ip FAMILY rule"},
		{"the rule of the way to nodes", gateway, "ip FAMILY rule del pref 1999", "ip FAMILY rule"},
		{"all rules", node, "ip FAMILY rule flush; ip FAMILY rule add pref 32766 lookup main", "ip FAMILY rule show pref 1200"},
		{"the route to gateways", node, "ip FAMILY route flush table TABLE", "ip FAMILY route show table TABLE"},
		{"the route to gateways leads elsewhere", node, "ip FAMILY route replace default dev eth0 table TABLE proto 94", "ip FAMILY route show table TABLE"},
		{"the routes to nodes", gateway, "ip FAMILY route flush table 15189", "ip FAMILY route show table 15189"},
		{"an egress IP is not local", gateway, "ip FAMILY route flush table 15188", "ip FAMILY route show table 15188"},
		{"an egress IP is local before all marks", gateway, "ip route add local IP4 dev egret0 table local", "ip route show table local"},
		{"a route too many", gateway, "ip FAMILY route add default dev egret.vx table 15189 proto 94", "ip FAMILY route show table 15189"},

		{"the overlay", node, "ip link del egret.vx", "ip -d link show egret.vx"},
		{"the overlay of the gateway", gateway, "ip link del egret.vx", "ip -d link show egret.vx"},
		{"the overlay is another", node, "ip link set egret.vx type vxlan learning", "ip -d link show egret.vx"},
		{"the overlay is down", node, "ip link set egret.vx down", "ip -d link show egret.vx"},
		{"the overlay is a bridge's port", node, "ip link set egret.vx master cni0", "ip -d link show egret.vx"},
		{"the overlay's MTU", node, "ip link set egret.vx mtu 1300", "ip -d link show egret.vx"},
		{"the overlay's MAC", node, "ip link set egret.vx address 02:00:00:00:00:01", "ip -d link show egret.vx"},
		{"the overlay's flags", node, "ip link set egret.vx arp off", "ip -d link show egret.vx"},
		{"the overlay's address", node, "ip FAMILY addr flush dev egret.vx", "ip FAMILY addr show egret.vx"},
		{"an address too many", node, "ip addr add 192.0.2.1/32 dev egret.vx", "ip addr show egret.vx"},
		{"the overlay's reverse path filter", gateway, "sysctl -qw net.ipv4.conf.egret/vx.rp_filter=1", "sysctl net.ipv4.conf.egret/vx.rp_filter"},
		{"what a former version had beside it", gateway, "ip link add egret.vo type veth peer name egret.vi", "ip -br link show type veth"},
		{"a neighbour", node, "ip FAMILY neigh flush nud permanent dev egret.vx || true" /* it gives up when they come back as fast */, "ip FAMILY neigh show nud permanent dev egret.vx"},
		{"a neighbour's MAC", node, "ip neigh replace 192.0.0.2 lladdr 02:00:00:00:00:01 nud permanent dev egret.vx", "ip neigh show nud permanent dev egret.vx"},
		{"a neighbour is not permanent", node, "ip neigh replace 192.0.0.2 lladdr 02:e9:00:00:00:00 nud reachable dev egret.vx", "ip neigh show nud permanent dev egret.vx"},
		{"an FDB entry", node, "bridge fdb del MAC dev egret.vx dst 10.10.0.10NUMBER", "bridge fdb show dev egret.vx"},
		{"an FDB entry leads elsewhere", node, "bridge fdb replace MAC dev egret.vx dst 10.10.0.199", "bridge fdb show dev egret.vx"},

		{"the link of the addresses", gateway, "ip link del egret0", "ip -br addr show egret0"},
		{"the link of the addresses is up", gateway, "ip link set egret0 up", "ip -br addr show egret0"},
		{"an address", gateway, "ip FAMILY addr flush dev egret0", "ip FAMILY addr show egret0"},
		{"an address is preferred", gateway, "ip -6 addr change IP6/128 dev egret0 preferred_lft forever", "ip -6 addr show egret0"},
		{"an address ends", gateway, "ip addr change IP4/32 dev egret0 valid_lft 2 preferred_lft 2", "ip addr show egret0"},
		{"the group of an address", gateway, "ip -6 addr del ff02::1:ff00:16/128 dev eth0", "ip -6 addr show eth0"},
		{"answers to neighbours", gateway, "sysctl -qw net.ipv6.conf.eth0.proxy_ndp=0", "sysctl net.ipv6.conf.eth0.proxy_ndp"},
		{"an address that is none of the node's", gateway, "ip addr add 10.10.0.77/32 dev egret0", "ip addr show egret0"},

		{"the tables", node, "nft delete table inet egret; nft delete table arp egret; nft delete table netdev egret", "nft list tables"},
		{"the whole table", node, "nft delete table inet egret", "nft list map inet egret nexthop"},
		{"the whole table of the gateway", gateway, "nft delete table inet egret", "nft list map inet egret snat4"},
		{"the ARP table of the gateway", gateway, "nft delete table arp egret", "nft list set arp egret egressip4"},
		{"the ARP answers of the gateway", gateway, "nft delete table netdev egret", "nft list table netdev egret"},
		{"a table sleeps", gateway, "nft 'add table inet egret { flags dormant ; }'", "nft list table inet egret"},
		{"a pod's element", node, "nft delete element inet egret pod4 { POD4 } ; nft delete element inet egret pod6 { POD6 }", "nft list map inet egret pod4"},
		{"a pod has another's", node, "nft 'delete element inet egret pod4 { POD4 } ; add element inet egret pod4 { POD4 : 0x0e9e1fff }'", "nft list map inet egret pod4"},
		{"a source is another", gateway, "nft flush map inet egret snat6", "nft list map inet egret snat6"},
		{"the ports of the pod's node", node, "nft flush map inet egret block4", "nft list map inet egret block4"},
		{"the ports of other nodes", gateway, "nft flush map inet egret port4", "nft list map inet egret port4"},
		{"who may send with them", gateway, "nft flush set inet egret origin6", "nft list set inet egret origin6"},
		{"the gateway of a connection", node, "nft flush map inet egret gateway", "nft list map inet egret gateway"},
		{"the nodes of the overlay", node, "nft flush map netdev egret node", "nft list map netdev egret node"},
		{"exceptions", node, "nft flush set inet egret except4", "nft list set inet egret except4"},
		{"an exception too many", node, "nft add element inet egret except4 { 203.0.113.0/24 }", "nft list set inet egret except4"},
		{"known nodes", node, "nft flush set inet egret node4", "nft list set inet egret node4"},
		{"the rules of a chain", node, "nft flush chain inet egret prerouting", "nft list chain inet egret prerouting"},
		{"a rule that accepts everything", gateway, "nft insert rule inet egret permitted accept", "nft list chain inet egret permitted"},
		{"a chain's policy", gateway, "nft 'add chain inet egret guard { policy drop ; }'", "nft list chain inet egret guard"},
		{"the overlay's forwarding", gateway, "sysctl -qw net.ipv4.conf.egret/vx.forwarding=0", "sysctl net.ipv4.conf.egret/vx.forwarding"},
		{"the overlay's IPv6 is off", gateway, "sysctl -qw net.ipv6.conf.egret/vx.disable_ipv6=1", "ip -6 addr show egret.vx"},
		{"permits", gateway, "nft 'flush set inet egret permit4 ; flush set inet egret permit6 ; flush set arp egret permit4'", "nft list set arp egret permit4"},
	}
	for _, node := range []string{node, gateway} {
		shareTables(t, node)
	}
	for _, tt := range tests {
		forms := []string{""}
		if strings.Contains(tt.breaks, "FAMILY") {
			forms = []string{"-4", "-6"}
		}
		for _, family := range forms {
			breaks, shows := words.Replace(strings.ReplaceAll(tt.breaks, "FAMILY", family)), words.Replace(strings.ReplaceAll(tt.shows, "FAMILY", family))
			if !t.Run(strings.TrimSpace(tt.name+" "+family), func(t *testing.T) {
				show := func() string {
					// while it is gone, the command fails
					out, _ := cluster.Exec(t.Context(), "node", tt.node, strings.Fields(shows)...)
					lines := strings.Split(passing.ReplaceAllString(stable(string(out)), ""), "\n")
					slices.Sort(lines) // rules of one priority are in the order in which they came
					return strings.Join(lines, "\n")
				}
				before := show()
				if before == "" {
					t.Fatalf("%s prints nothing before", shows)
				}
				if out, err := cluster.Exec(t.Context(), "node", tt.node, "sh", "-ec", breaks); err != nil {
					t.Fatalf("%s: %v\n%s", breaks, err, out)
				}
				broken := time.Now()
				for show() != before {
					if time.Since(broken) > 5*time.Second {
						t.Fatalf("%s does not print the same again\nbefore:\n%s\nnow:\n%s", shows, before, show())
					}
				}
				if took := time.Since(broken); took > 2*time.Second {
					t.Errorf("back after %v, want two seconds at most", took)
				}
				for _, ip := range ips {
					leavesAs(t, pod.Name, ip)
				}
			}) {
				return // what is still broken breaks the others
			}
		}
	}
}
