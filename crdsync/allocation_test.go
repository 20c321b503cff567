package crdsync

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/egret-project/egret/egress"
)

var ip = netip.MustParseAddr

var compareIPs = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })

func poolOf(name string, ends ...string) egress.Pool {
	p := egress.Pool{Name: name}
	for i := 0; i < len(ends); i += 2 {
		p.Ranges = append(p.Ranges, egress.Range{Start: ip(ends[i]), End: ip(ends[i+1])})
	}
	return p
}

// ask is a demand in short: "name pool=a ip=10.0.0.1 status=10.0.0.2 broken".
func ask(s string) demand {
	f := strings.Fields(s)
	d := demand{name: f[0]}
	for _, field := range f[1:] {
		k, v, _ := strings.Cut(field, "=")
		switch k {
		case "pool":
			d.pools = append(d.pools, v)
		case "ip":
			d.ips = append(d.ips, ip(v))
		case "status":
			d.statusIPs = append(d.statusIPs, ip(v))
		case "broken":
			d.addressErr = fmt.Errorf("broken")
		}
	}
	return d
}

// taken is an allocation in short: "10.0.0.1 pool id egress...".
func taken(s string) egress.Allocation {
	f := strings.Fields(s)
	a := egress.Allocation{IP: ip(f[0]), Egresses: f[3:]}
	if f[1] != "-" {
		a.Pool = f[1]
	}
	fmt.Sscan(f[2], &a.ID)
	return a
}

// give allocates and numbers, and returns what each egress has, "ip/id ...", and why it was refused.
func give(pools map[string]egress.Pool, allocations, asks []string) (got, refused map[string]string) {
	have, ids, last := map[netip.Addr]egress.Allocation{}, map[egress.ID]netip.Addr{}, egress.ID(0)
	for _, s := range allocations {
		a := taken(s)
		have[a.IP], ids[a.ID], last = a, a.IP, max(last, a.ID)
	}
	var requests []request
	for _, s := range asks {
		d := ask(s)
		r := request{name: d.name, keep: d.addressErr != nil}
		if !r.keep {
			r.wants = wants(d, pools, nil)
		}
		for _, ip := range d.statusIPs {
			r.prefer = append(r.prefer, egress.Address{IP: ip})
		}
		requests = append(requests, r)
	}
	out := allocate(requests, pools, map[netip.Addr]string{ip("10.3.0.1"): "n1", ip("10.3.0.3"): "n2"}, have)
	number(requests, out, ids, last)
	got, refused = map[string]string{}, map[string]string{}
	for name, o := range out {
		var s []string
		for _, a := range o.addresses {
			s = append(s, fmt.Sprintf("%s/%d", a.IP, a.ID))
		}
		if len(s) > 0 {
			got[name] = strings.Join(s, " ")
		}
		if o.err != nil {
			refused[name] = o.err.Error()
		}
	}
	return got, refused
}

func TestAllocation(t *testing.T) {
	tests := map[string]struct {
		have   []string // allocations
		asks   []string // oldest first
		want   map[string]string
		refuse map[string]string // a part of the reason
	}{
		"the lowest free address is given, the oldest egress first": {
			asks: []string{"z pool=a", "b pool=a"},
			want: map[string]string{"z": "10.0.0.1/1", "b": "10.0.0.2/2"},
		},
		"what etcd has stays, whatever the order and the status": {
			have: []string{"10.0.0.2 a 7 b", "10.0.0.3 a 8 z"},
			asks: []string{"z pool=a status=10.0.0.1", "b pool=a"},
			want: map[string]string{"z": "10.0.0.3/8", "b": "10.0.0.2/7"},
		},
		"without an allocation in etcd the status tells": {
			asks: []string{"z pool=a", "b pool=a status=10.0.0.1"},
			want: map[string]string{"z": "10.0.0.2/1", "b": "10.0.0.1/2"},
		},
		"a status outside of the pool, or in use, tells nothing": {
			have: []string{"10.0.0.2 a 5 x"},
			asks: []string{"x pool=a", "b pool=a status=10.0.1.9", "c pool=a status=10.0.0.2"},
			want: map[string]string{"x": "10.0.0.2/5", "b": "10.0.0.1/6", "c": "10.0.0.3/7"},
		},
		"the address that the spec names": {
			asks: []string{"z pool=a ip=10.0.0.3"},
			want: map[string]string{"z": "10.0.0.3/1"},
		},
		"an address that a younger egress names is given to others last": {
			asks: []string{"z pool=a", "b pool=a ip=10.0.0.1"},
			want: map[string]string{"z": "10.0.0.2/1", "b": "10.0.0.1/2"},
		},
		"the oldest gets the last address, even one that a younger egress names": {
			have:   []string{"10.0.0.2 a 1 x", "10.0.0.3 a 2 y"},
			asks:   []string{"x pool=a", "y pool=a", "z pool=a", "b pool=a ip=10.0.0.1"},
			want:   map[string]string{"x": "10.0.0.2/1", "y": "10.0.0.3/2", "z": "10.0.0.1/3"},
			refuse: map[string]string{"b": "in use by egress z"},
		},
		"a second egress that names a pool address is refused": {
			have: []string{"10.0.0.3 a 4 z"},
			asks: []string{"b pool=a ip=10.0.0.3", "z pool=a ip=10.0.0.3"},
			want: map[string]string{"z": "10.0.0.3/4"}, refuse: map[string]string{"b": "10.0.0.3 is in use by egress z"},
		},
		"an address outside of the pool is refused, and no other takes its place": {
			asks: []string{"b pool=a ip=10.0.1.9"}, refuse: map[string]string{"b": "10.0.1.9 is not an address of pool a"},
		},
		"the pool is exhausted": {
			asks:   []string{"v pool=a", "w pool=a", "x pool=a", "b pool=a", "c pool=big"},
			want:   map[string]string{"v": "10.0.0.1/1", "w": "10.0.0.2/2", "x": "10.0.0.3/3", "c": "10.1.0.1/4"},
			refuse: map[string]string{"b": "pool a has no free address: it has 3"},
		},
		"the pool has no address at all": {
			asks: []string{"b pool=empty"}, refuse: map[string]string{"b": "pool empty has no address: of a cidr, neither the first one nor"},
		},
		"the pool does not exist": {
			asks: []string{"b pool=none", "c pool=a"}, want: map[string]string{"c": "10.0.0.1/1"}, refuse: map[string]string{"b": "pool none does not exist"},
		},
		"an address that is given up is not given to another before etcd has it free": {
			have: []string{"10.0.0.1 a 1 z", "10.0.0.2 a 2 gone"},
			asks: []string{"z pool=big", "b pool=a"},
			want: map[string]string{"z": "10.1.0.1/3", "b": "10.0.0.3/4"},
		},
		"an address that a pool of that name no longer has is given up": {
			have: []string{"10.0.0.9 a 1 z"}, asks: []string{"z pool=a"}, want: map[string]string{"z": "10.0.0.1/2"},
		},
		"a static address is shared, with one id": {
			asks: []string{"z ip=10.0.0.200", "b ip=10.0.0.200"}, want: map[string]string{"z": "10.0.0.200/1", "b": "10.0.0.200/1"},
		},
		"another joins a static address": {
			have: []string{"10.0.0.200 - 9 z"}, asks: []string{"b ip=10.0.0.200", "z ip=10.0.0.200"},
			want: map[string]string{"z": "10.0.0.200/9", "b": "10.0.0.200/9"},
		},
		"a pool address is no static one": {
			have: []string{"10.0.0.1 a 9 z"}, asks: []string{"z pool=a", "b ip=10.0.0.1"},
			want: map[string]string{"z": "10.0.0.1/9"}, refuse: map[string]string{"b": "in use by egress z"},
		},
		"what cannot be read keeps what it has": {
			have: []string{"10.0.0.1 a 9 z"}, asks: []string{"z broken", "b pool=a ip=10.0.0.1", "c broken"},
			want: map[string]string{"z": "10.0.0.1/9"}, refuse: map[string]string{"b": "in use by egress z"},
		},
		"one address of each family": {
			asks: []string{"z pool=six pool=a", "b pool=both", "c pool=six pool=both", "d ip=10.0.0.3 pool=a pool=six"},
			want: map[string]string{"z": "10.0.0.1/1 fd00::1/2", "b": "fd01::1/3", "c": "10.2.0.1/4 fd00::2/5", "d": "10.0.0.3/6 fd00::3/7"},
		},
		"an address of a node is not given out": {
			asks: []string{"y pool=nodes status=10.3.0.3", "z pool=nodes", "b pool=nodes ip=10.3.0.1", "c ip=10.3.0.3"},
			want: map[string]string{"y": "10.3.0.2/1", "c": "10.3.0.3/2"},
			refuse: map[string]string{
				"z": "pool nodes has no free address: it has 3, of which 2 are the nodes' own",
				"b": "10.3.0.1 is the address of node n1: want another one of pool nodes, or no pool",
			},
		},
		"an address that became a node's stays": {
			have: []string{"10.3.0.1 nodes 7 z"}, asks: []string{"z pool=nodes"}, want: map[string]string{"z": "10.3.0.1/7"},
		},
		"two pools of one family": {
			asks: []string{"z pool=a pool=big"}, want: map[string]string{"z": "10.0.0.1/1"},
			refuse: map[string]string{"z": "pool big: another address of its IP family is asked for already"},
		},
	}
	pools := map[string]egress.Pool{
		"a": poolOf("a", "10.0.0.1", "10.0.0.3"), "big": poolOf("big", "10.1.0.1", "10.1.0.200"), "six": poolOf("six", "fd00::1", "fd00::ffff:ffff"),
		"both":  poolOf("both", "fd01::1", "fd01::ffff:ffff:ffff", "10.2.0.1", "10.2.0.2"),
		"empty": {Name: "empty"}, "nodes": poolOf("nodes", "10.3.0.1", "10.3.0.3"),
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			got, refused := give(pools, tt.have, tt.asks)
			if d := cmp.Diff(tt.want, got); d != "" && len(tt.want)+len(got) > 0 {
				t.Errorf("addresses (-want +got):\n%s", d)
			}
			for name, err := range refused {
				if tt.refuse[name] == "" || !strings.Contains(err, tt.refuse[name]) {
					t.Errorf("egress %s: refused because %q, want %q", name, err, tt.refuse[name])
				}
			}
			if len(refused) != len(tt.refuse) {
				t.Errorf("refused: %v, want %v", refused, tt.refuse)
			}
		})
	}
}

func TestAnEgressPrefersTheAddressAndIDThatItHad(t *testing.T) {
	pools := map[string]egress.Pool{"a": poolOf("a", "10.0.0.1", "10.0.0.9")}
	r := []request{{name: "z", wants: []want{{pool: "a"}}, prefer: []egress.Address{{IP: ip("10.0.0.5"), ID: 17, Pool: "a"}, {IP: ip("10.0.0.6")}}}}
	out := allocate(r, pools, nil, nil)
	number(r, out, map[egress.ID]netip.Addr{17: ip("10.0.0.5")}, 20)
	want := []egress.Address{{IP: ip("10.0.0.5"), ID: 17, Pool: "a"}}
	if d := cmp.Diff(want, out["z"].addresses, compareIPs); d != "" {
		t.Errorf("addresses (-want +got):\n%s", d)
	}
}

func TestIDsAreNotUsedAgainAtOnce(t *testing.T) {
	last := egress.MaxID - 1
	used := map[int]bool{1: true}
	for _, want := range []int{int(egress.MaxID), 2, 3} {
		id, ok := nextFree(int(last), int(egress.MaxID), func(n int) bool { return used[n] })
		if !ok || id != want {
			t.Fatalf("after %d: got %d, %t, want %d", last, id, ok, want)
		}
		last = egress.ID(id)
	}
	if id, ok := nextFree(0, 3, func(int) bool { return true }); ok {
		t.Errorf("all in use: got %d", id)
	}
}

func TestTheIndexOfANodeThatWentIsNotUsedAgainAtOnce(t *testing.T) {
	nodes := []egress.Node{{Name: "a", Index: 1}, {Name: "b", Index: 2}}
	last := indexNodes(nodes, 2)
	for _, want := range []int{3, 4} { // the node with the largest index goes, and another comes
		nodes = []egress.Node{nodes[0], {Name: "b"}}
		if last = indexNodes(nodes, last); nodes[1].Index != want || last != want {
			t.Fatalf("the next node has index %d, and %d is the last: want %d", nodes[1].Index, last, want)
		}
	}
}

func TestNodeIndexesAreStableAndUnique(t *testing.T) {
	nodes := []egress.Node{{Name: "a", Index: 3}, {Name: "b"}, {Name: "c", Index: 3}, {Name: "d", Index: egress.MaxNodeIndex}, {Name: "e", Index: -1}}
	if last := indexNodes(nodes, 0); last != 4 {
		t.Errorf("the last is %d, want 4", last)
	}
	got := map[string]int{}
	for _, n := range nodes {
		got[n.Name] = n.Index
	}
	if d := cmp.Diff(map[string]int{"a": 3, "b": 1, "c": 2, "d": egress.MaxNodeIndex, "e": 4}, got); d != "" {
		t.Errorf("indexes (-want +got):\n%s", d)
	}
}
