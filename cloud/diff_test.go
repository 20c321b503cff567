package cloud

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/egret-project/egret/egress"
)

func TestWhatIsDoneNextAboutAnAddress(t *testing.T) {
	four, six := netip.MustParseAddr("10.0.0.50"), netip.MustParseAddr("fd00::50")
	mine, second := netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("10.0.0.3")
	node := egress.Node{Name: "n", Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1")}}
	other := egress.Node{Name: "o", Addresses: []netip.Addr{mine, second}}
	ours, asked := &egress.CloudAddress{}, &egress.CloudAddress{Asked: []string{"eni-a"}}
	for name, tt := range map[string]struct {
		ip        netip.Addr
		record    *egress.CloudAddress
		holder    string
		owner     string
		allocated bool // also where there is an owner, unless stray
		stray     bool
		want      step // the zero step: none
		err       string
	}{
		"nobody has it: it is asked for, and nobody loses it":            {ip: four, owner: "n", want: step{verb: assign, iface: "eni-n"}},
		"one of Egret's goes on to the owner":                            {ip: four, owner: "n", record: ours, holder: "eni-a", want: step{verb: assign, iface: "eni-n", move: true}},
		"one that was asked for, and is there, is Egret's":               {ip: four, owner: "n", record: asked, holder: "eni-a", want: step{verb: assign, iface: "eni-n", move: true}},
		"one that was asked for, and is nowhere, is asked for elsewhere": {ip: four, owner: "n", record: asked, want: step{verb: assign, iface: "eni-n"}},
		"one that was asked for, and is another's, is another's":         {ip: four, owner: "n", record: asked, holder: "eni-b", err: "eni-b has the address"},
		"somebody else's is left where it is":                            {ip: four, owner: "n", holder: "eni-b", err: "eni-b has the address"},
		"one that is where it is wanted is written down":                 {ip: four, owner: "n", holder: "eni-n", want: step{verb: confirm, iface: "eni-n"}},
		"and then nothing":                    {ip: four, owner: "n", record: ours, holder: "eni-n"},
		"IPv6 is taken away first":            {ip: six, owner: "n", record: ours, holder: "eni-a", want: step{verb: unassign, iface: "eni-a"}},
		"and then assigned":                   {ip: six, owner: "n", record: ours, want: step{verb: assign, iface: "eni-n"}},
		"a node that the cloud does not know": {ip: four, owner: "m", record: ours, holder: "eni-a", err: "node m: the cloud shows no network interface"},
		"without an owner it stays":           {ip: four, record: ours, holder: "eni-a", allocated: true},
		"without an allocation, too, it goes": {ip: four, record: ours, holder: "eni-a", want: step{verb: unassign, iface: "eni-a"}},
		"and is forgotten":                    {ip: four, record: ours, want: step{verb: forget}},
		"one that was asked for, and that another has, is forgotten alone": {ip: four, record: asked, holder: "eni-b", want: step{verb: forget}},
		"one that is allocated to nobody any more stays with its owner":    {ip: four, owner: "n", record: ours, holder: "eni-a", stray: true},
		"what is no egress IP is not given to who says that he owns it":    {ip: four, owner: "n", holder: "eni-n", stray: true},
		"and not taken from anybody":                                       {ip: four, owner: "n", holder: "eni-b", stray: true},
		"a node's own address stays, if a pool has it":                     {ip: mine, owner: "n", holder: "eni-o", err: "is an address of node o: take it out of its pool"},
		"where it is its owner's, too":                                     {ip: mine, owner: "o", holder: "eni-o", err: "is an address of node o: take it out of its pool"},
		"another than the first, too":                                      {ip: second, owner: "o", holder: "eni-o", err: "is an address of node o: take it out of its pool"},
		"one that Egret assigned, and that Kubernetes shows as the node's": {ip: second, owner: "n", record: ours, holder: "eni-o", want: step{verb: assign, iface: "eni-n", move: true}},
		"a first one stays whatever etcd says, and is forgotten":           {ip: mine, record: ours, holder: "eni-o", want: step{verb: forget}},
		"what Egret never had stays":                                       {ip: four, holder: "eni-b"},
	} {
		t.Run(name, func(t *testing.T) {
			s := state{
				nodes: map[string]egress.Node{}, own: map[netip.Addr]own{}, owners: map[netip.Addr]egress.Owner{}, records: map[netip.Addr]egress.CloudAddress{},
				allocated: map[netip.Addr]bool{tt.ip: tt.allocated || tt.owner != "" && !tt.stray},
				holders:   map[netip.Addr]string{node.Addresses[0]: "eni-n", mine: "eni-o"},
			}
			s.addNode(node)
			s.addNode(other)
			if tt.owner != "" {
				s.owners[tt.ip] = egress.Owner{IP: tt.ip, Node: tt.owner}
			}
			if tt.record != nil {
				s.records[tt.ip] = *tt.record
			}
			if tt.holder != "" {
				s.holders[tt.ip] = tt.holder
			}
			if tt.want.verb != "" {
				tt.want.ip = tt.ip
			}
			got, ok, err := s.next(tt.ip)
			if d := cmp.Diff(tt.want, got, cmp.AllowUnexported(step{}), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); d != "" || ok != (tt.want.verb != "") {
				t.Errorf("%t (-want +got):\n%s", ok, d)
			}
			if (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
				t.Errorf("error %v, want %q", err, tt.err)
			}
		})
	}
}

// Kubernetes shows the egress IP among the node's addresses, the cloud does not know the first of these, and somebody
// has moved the egress IP to another interface of the node.
func TestAnAddressDoesNotTellWhereItIsWanted(t *testing.T) {
	ip, primary := netip.MustParseAddr("10.0.0.50"), netip.MustParseAddr("10.0.0.1")
	n := egress.Node{Name: "n", Addresses: []netip.Addr{netip.MustParseAddr("192.168.0.1"), ip, primary}}
	s := state{
		nodes: map[string]egress.Node{}, own: map[netip.Addr]own{}, allocated: map[netip.Addr]bool{ip: true},
		owners:  map[netip.Addr]egress.Owner{ip: {IP: ip, Node: "n"}},
		records: map[netip.Addr]egress.CloudAddress{ip: {IP: ip}},
		holders: map[netip.Addr]string{ip: "eni-b", primary: "eni-a"},
	}
	s.addNode(n)
	want := step{verb: assign, ip: ip, iface: "eni-a", move: true}
	if got, ok, err := s.next(ip); !ok || err != nil || got != want {
		t.Errorf("next is %+v, %v, %v; want %+v", got, ok, err, want)
	}
}
