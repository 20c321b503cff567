package crdsync

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

func TestRangesCoverThePodsAndNobodyElse(t *testing.T) {
	for _, tt := range []struct{ addrs, want string }{
		{"", "[]"},
		{"10.0.0.1", "[10.0.0.1/32]"},
		{"10.0.0.3 10.0.0.2 10.0.0.3", "[10.0.0.2/31]"},
		{"10.0.0.1 10.0.0.2", "[10.0.0.1/32 10.0.0.2/32]"},
		{"10.0.0.4 10.0.0.5 10.0.0.6 10.0.0.7 10.0.0.8", "[10.0.0.4/30 10.0.0.8/32]"},
		{"fd00::1 10.0.0.1 fd00::", "[10.0.0.1/32 fd00::/127]"},
	} {
		var addrs []netip.Addr
		for _, text := range strings.Fields(tt.addrs) {
			addrs = append(addrs, netip.MustParseAddr(text))
		}
		if got := fmt.Sprint(cover(addrs)); got != tt.want {
			t.Errorf("%s: %s, want %s", tt.addrs, got, tt.want)
		}
	}
	r := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		in := map[netip.Addr]bool{}
		for range r.IntN(200) {
			in[netip.AddrFrom4([4]byte{10, 0, 0, byte(r.IntN(256))})] = true
		}
		var addrs []netip.Addr
		for a := range in {
			addrs = append(addrs, a)
		}
		covered := 0
		for _, p := range cover(addrs) {
			for a := p.Addr(); p.Contains(a); a = a.Next() {
				if covered++; !in[a] {
					t.Fatalf("%v covers %s, which is no pod", p, a)
				}
			}
		}
		if covered != len(in) {
			t.Fatalf("%d addresses are covered, of %d", covered, len(in))
		}
	}
}

func TestARangeIsThatOfPodsWhichTheirNodeDoesNotName(t *testing.T) {
	m := &mirror{
		nodes: map[string]egress.Node{
			"none": {Name: "none"}, "some": {Name: "some", PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")}},
		},
		clusterCIDRs: []netip.Prefix{netip.MustParsePrefix("10.99.0.0/16")},
	}
	pods := func(ips ...string) (out []pod) {
		for _, ip := range ips {
			out = append(out, pod{ips: []netip.Addr{netip.MustParseAddr(ip)}})
		}
		return out
	}
	for name, tt := range map[string]struct {
		node string
		pods []pod
		want string
	}{
		"none of a node without podCIDRs":       {"none", nil, `{"node":"none","cidrs":[]}`},
		"of a node without podCIDRs":            {"none", pods("10.244.1.7", "10.99.0.1"), `{"node":"none","cidrs":["10.244.1.7/32"]}`},
		"of a node with podCIDRs":               {"some", pods("10.244.1.7"), ""},
		"beside a node's podCIDRs":              {"some", pods("10.244.1.7", "172.16.0.1", "fd00::1"), `{"node":"some","cidrs":["172.16.0.1/32","fd00::1/128"]}`},
		"of a node that is gone, with its pods": {"gone", nil, ""},
		"of a node that is gone":                {"gone", pods("172.16.0.1"), `{"node":"gone","cidrs":["172.16.0.1/32"]}`},
		"what is no pod's address anywhere":     {"none", pods("127.0.0.1", "0.0.0.0", "224.0.0.1", "169.254.0.1", "fe80::1", "255.255.255.255"), `{"node":"none","cidrs":[]}`},
		"those that were named":                 {"-", nil, `{"node":"-","cidrs":["10.99.0.0/16"]}`},
	} {
		got := ""
		if v := m.ranges(tt.node, tt.pods); v != nil {
			b, err := store.Encode(v)
			if err != nil {
				t.Fatal(err)
			}
			got = string(b)
		}
		if got != tt.want {
			t.Errorf("%s: %s, want %s", name, got, tt.want)
		}
	}
}

// testRanges: nodes without podCIDRs, and a node whose CNI does not care for them.
func testRanges(c *cluster) {
	nodes := c.core.CoreV1().Nodes()
	bare := func(name string) {
		c.Helper()
		if _, err := nodes.Create(c.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
			c.Fatal(err)
		}
	}
	want := func(pairs ...string) {
		c.Helper()
		all := map[string]string{}
		for _, p := range pairs {
			node, cidrs, _ := strings.Cut(p, " ")
			all["pods/"+node] = fmt.Sprintf(`{"node":%q,"cidrs":[%s]}`, node, cidrs)
		}
		c.wantRecords("pods/*", all)
	}
	c.run(c.kube)
	bare("bare-1")
	c.node("node-1", "192.0.2.1") // 10.244.0.0/24
	want("bare-1")
	c.pod("prod", "a", "bare-1", "100.64.0.2", "web")
	c.pod("prod", "b", "bare-1", "100.64.0.3", "web")
	c.pod("prod", "in", "node-1", "10.244.0.9", "web")
	c.pod("prod", "out", "node-1", "10.99.0.9", "web")
	want(`bare-1 "100.64.0.2/31"`, `node-1 "10.99.0.9/32"`)
	c.deletePod("prod", "a", 0)
	c.deletePod("prod", "out", 0)
	want(`bare-1 "100.64.0.3/32"`)
	if _, err := c.etcd.Client().Delete(c.Context(), store.DefaultPrefix+store.PodKey("bare-1")); err != nil {
		c.Fatal(err)
	}
	want(`bare-1 "100.64.0.3/32"`) // somebody else took it away
	patch := []byte(`{"spec": {"podCIDR": "100.64.0.0/24", "podCIDRs": ["100.64.0.0/24"]}}`)
	if _, err := nodes.Patch(c.Context(), "bare-1", types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
		c.Fatal(err)
	}
	want()
	bare("bare-2")
	want("bare-2")
	if err := nodes.Delete(c.Context(), "bare-2", metav1.DeleteOptions{}); err != nil {
		c.Fatal(err)
	}
	want()
}
