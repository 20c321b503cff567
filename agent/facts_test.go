package agent

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/netns"
)

// TestLocalAddressesFollowTheLinks says which addresses a node would claim as static egress IPs.
func TestLocalAddressesFollowTheLinks(t *testing.T) {
	netns.Enter(t)
	a := &agent{kernel: &kernel{}}
	a.Node, a.NodeIP = "node-1", netip.MustParseAddr("192.0.2.101")
	local := func() string {
		t.Helper()
		f, err := a.facts(&egress.Snapshot{})
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, ip := range slices.SortedFunc(maps.Keys(f.Local), netip.Addr.Compare) {
			out = append(out, ip.String())
		}
		return strings.Join(out, " ")
	}
	for _, line := range []string{
		"ip link add kube-ipvs0 type bridge", "ip addr add 192.0.2.7/32 dev kube-ipvs0", "ip addr add 192.0.2.9/32 dev kube-ipvs0",
		"ip link add egret0 type bridge", "ip addr add 192.0.2.8/32 dev egret0",
		"ip link add uplink type veth peer name other", "ip link set uplink up", "ip link set other up",
		"ip addr add 192.0.2.101/24 dev uplink",
	} {
		netns.Run(t, line)
	}
	for _, step := range []struct{ line, want string }{
		{"ip link set kube-ipvs0 down", "192.0.2.101"},
		{"ip addr add 192.0.2.9/32 dev uplink", "192.0.2.9 192.0.2.101"}, // on kube-ipvs0 too
		{"ip addr add 192.0.2.10/32 dev other", "192.0.2.9 192.0.2.10 192.0.2.101"},
		{"ip addr del 192.0.2.9/32 dev uplink", "192.0.2.10 192.0.2.101"},
	} {
		netns.Run(t, step.line)
		if got := local(); got != step.want {
			t.Errorf("after %s: got %s, want %s", step.line, got, step.want)
		}
	}
}
