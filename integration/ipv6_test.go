package integration

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/integration/lab"
)

func TestIPv6SelectedPodsLeaveWithTheirEgressIPAndOthersAsBefore(t *testing.T) {
	n := newNamespace(t)
	n.pool("six", "fd10::11", "fd10::11")
	n.egress("six", "six", "web")
	ip, _ := held(t, "six")
	for i, node := range nodes() {
		web, none := n.pod("web-"+node, node, "web"), n.pod("none-"+node, node, "db")
		selected(t, web, ip)
		// The egress has no IPv4 address and takes nothing of that family.
		for _, own := range lab.NodeIPs(i + 1) {
			leavesAs(t, none, own)
			if own.Is4() {
				leavesAs(t, web, own)
			}
		}
	}
}

func TestIPv6PowerOffOfTheGatewayGivesTheSameSourceAgain(t *testing.T) {
	powerOff(t, "off-six", "fd10::14")
}

func TestIPv6PlannedMoveLosesNoPacket(t *testing.T) {
	plannedMove(t, "move-six", "fd10::18")
}

func TestIPv6FrozenOwnerStopsAnsweringAndAnotherTakesOver(t *testing.T) {
	ip, gateway, began := takeOver(t, "frozen-six", "fd10::15", cluster.Freeze, cluster.Thaw)
	last := watch.LastAnswer(ip, gateway)
	if last.IsZero() {
		t.Errorf("%s never answered for %s: the test proves nothing", gateway, ip)
	}
	if silent := last.Sub(began); silent > time.Second {
		t.Errorf("%s answered for %s for %v after its agent was frozen", gateway, ip, silent)
	}
}

func TestDualStackEgressServesBothFamilies(t *testing.T) {
	n := newNamespace(t)
	n.dual("both", "10.10.0.30", "fd10::30")
	ips := bothIPs(t, "both")
	for _, node := range nodes() {
		selected(t, n.pod("web-"+node, node, "web"), ips...)
	}
	// A move of one takes both, and loses nothing of either.
	from := ownership(t)[ips[0]]
	node := otherNode(from)
	to := otherNode(from, node)
	four := make(chan lab.ProbeResult, 1)
	go func() { four <- probeTo(t, lab.OutsideIP, n.name+"/web-"+node, 3*time.Second, func() {}) }()
	six := probeTo(t, lab.OutsideIP6, n.name+"/web-"+node, 3*time.Second, func() {
		t.Log(strings.TrimSpace(egret(t, "move", "fd10::30", "--to", to)))
		for _, ip := range ips {
			if owner := ownership(t)[ip]; owner != to {
				t.Errorf("%s is on %s, want %s", ip, owner, to)
			}
		}
	})
	lossless(t, "IPv6", six)
	lossless(t, "IPv4", <-four)
}

// Overlay and agents speak IPv6 alone to each other there.
func TestOverlayOverIPv6CarriesBothFamilies(t *testing.T) {
	ctx := t.Context()
	l, err := lab.Up(ctx, lab.Config{Name: lab.OwnName("e2e-six"), Nodes: 2, LeaseTTL: leaseTTL, IPv6Nodes: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Down(context.Background()); err != nil {
			t.Error(err)
		}
	})
	before := cluster
	cluster = l
	defer func() { cluster = before }()
	n := &namespace{t: t, name: "six"}
	n.dual("both", "10.10.0.30", "fd10::30")
	ips := bothIPs(t, "both")
	for _, node := range []string{"node-1", "node-2"} {
		pod := n.pod("web-"+node, node, "web")
		for _, ip := range ips {
			leavesAs(t, pod, ip)
			r := probeTo(t, outsideOf(ip), pod, time.Second, func() {})
			only(t, r, ip)
			lossless(t, fmt.Sprint(pod, " as ", ip), r)
		}
		fits(t, pod, node, 1430, ips) // its headers take 70 bytes of 1500
	}
}

// dual makes a pool of each family and an egress for app=web with an address of both.
func (n *namespace) dual(name, ip4, ip6 string) {
	n.t.Helper()
	n.pool(name+"-4", ip4, ip4)
	n.pool(name+"-6", ip6, ip6)
	n.apply(map[string]any{"kind": "Egress", "metadata": n.meta(name), "spec": map[string]any{
		"externalIPPools": []any{name + "-4", name + "-6"}, "appliedTo": map[string]any{
			"namespaceSelector": map[string]any{"matchLabels": map[string]any{"kubernetes.io/metadata.name": n.name}},
			"podSelector":       map[string]any{"matchLabels": map[string]any{"app": "web"}}}}})
}

// bothIPs waits until the egress has two addresses, and an owner for each.
func bothIPs(t *testing.T, name string) (ips []netip.Addr) {
	t.Helper()
	eventually(t, 15*time.Second, func() error {
		ips = nil
		owners := ownership(t)
		for _, p := range records[egress.Policy](t, "egresses") {
			for _, a := range p.Addresses {
				if p.Name == name && owners[a.IP] != "" {
					ips = append(ips, a.IP)
				}
			}
		}
		if len(ips) != 2 {
			return fmt.Errorf("egress %s: %v have an owner", name, ips)
		}
		return nil
	})
	return ips
}
