package agent

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/netns"
	"github.com/egret-project/egret/nft"
	"github.com/egret-project/egret/ownership"
	"github.com/egret-project/egret/plan"
	"github.com/egret-project/egret/routing"
)

func TestFaultsNameTheirPart(t *testing.T) {
	boom := errors.New("boom")
	tests := map[string]struct {
		err  error
		want map[string]string
	}{
		"none":                        {nil, map[string]string{}},
		"of no part":                  {errors.Join(boom), map[string]string{}},
		"one":                         {in("routes", boom), map[string]string{"routes": "boom"}},
		"one that is nil":             {errors.Join(in("routes", nil), in("nftables", boom)), map[string]string{"nftables": "boom"}},
		"several, joined and wrapped": {errors.Join(errors.Join(in("a", boom)), fmt.Errorf("so: %w", in("b", boom)), boom), map[string]string{"a": "boom", "b": "boom"}},
		"the first of a part":         {errors.Join(in("a", boom), in("a", errors.New("later"))), map[string]string{"a": "boom"}},
		"several of a part":           {in("a", errors.Join(boom, boom)), map[string]string{"a": "boom; boom"}},
	}
	for name, tt := range tests {
		if d := cmp.Diff(tt.want, faults(tt.err)); d != "" {
			t.Errorf("%s (-want +got):\n%s", name, d)
		}
	}
	if text := faults(in("a", errors.New("x"+strings.Repeat("é", 500))))["a"]; len(text) > maxFault || !utf8.ValidString(text) {
		t.Errorf("%d bytes, or half a character: %s", len(text), text)
	}
	if !errors.Is(in("a", boom), boom) {
		t.Error("the cause is hidden")
	}
}

func TestFaultsArePublishedOnceTheyStand(t *testing.T) {
	client := newEtcd(t)
	lease, err := client.Grant(t.Context(), 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	a := &agent{Config: Config{Node: "node-1", Store: client}, view: client.NewView("node-1"), driver: driver{machine: newMachine(ownership.Config{})}}
	a.machine.grant(lease)
	if err := client.PutAgent(t.Context(), lease, egress.Agent{Node: "node-1", Version: "v1"}, 0); err != nil {
		t.Fatal(err)
	}
	go func() { _ = a.view.Run(t.Context()) }() // it ends with the test
	<-a.view.Ready()
	report := func(err error) {
		t.Helper()
		if err := a.publishFaults(t.Context(), faults(err)); err != nil {
			t.Fatal(err)
		}
	}
	want := func(want map[string]string) {
		t.Helper()
		for a.view.Snapshot() == nil || !cmp.Equal(want, a.view.Snapshot().Agents["node-1"].Faults) {
			select {
			case <-a.view.Changed():
			case <-time.After(5 * time.Second):
				t.Fatalf("got %v, want %v", a.view.Snapshot().Agents, want)
			}
		}
	}
	want(nil)
	boom := in("routes", errors.New("boom"))
	report(boom)
	if got, err := client.Agent(t.Context(), "node-1"); err != nil || got.Faults != nil || got.Version != "v1" {
		t.Errorf("after a moment: %+v, %v, want no faults yet", got, err)
	}
	a.record.faultySince = a.record.faultySince.Add(-faultAge)
	report(boom)
	want(map[string]string{"routes": "boom"})
	report(errors.Join(boom, in("nftables", errors.New("no"))))
	want(map[string]string{"nftables": "no", "routes": "boom"})
	report(errors.New("etcd does not answer")) // nothing that is programmed
	want(nil)
}

// TestABrokenWayOutOfOnePoolHampersTheMovesOfItsIPsAlone has the kernel refuse the way out of a pool: its gateway is
// this node itself.
func TestABrokenWayOutOfOnePoolHampersTheMovesOfItsIPsAlone(t *testing.T) {
	netns.Enter(t)
	for _, line := range []string{"ip link add uplink type veth peer name other", "ip link set uplink up", "ip link set other up",
		"ip addr add 192.0.2.101/24 dev uplink"} {
		netns.Run(t, line)
	}
	router, err := routing.New(routing.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer router.Close()
	good, bad := egress.SubnetMark(1), egress.SubnetMark(2)
	addr := netip.MustParseAddr
	d := plan.Desired{
		Routing: routing.State{
			Overlay: routing.Overlay{Local: addr("192.0.2.101"), MTU: 1450},
			Subnets: []routing.Subnet{
				{Mark: good, Link: "uplink", Prefix: netip.MustParsePrefix("192.0.2.0/24"), Gateway: addr("192.0.2.1")},
				{Mark: bad, Link: "uplink", Prefix: netip.MustParsePrefix("192.0.2.0/24"), Gateway: addr("192.0.2.101")},
				{Mark: egress.SubnetMark(3), Link: "egret.7", Prefix: netip.MustParsePrefix("198.51.100.0/24"), Gateway: addr("198.51.100.1")},
			},
		},
		NFT: nft.State{Hosted: map[egress.ID]nft.Hosted{
			1: {IP: addr("192.0.2.11"), Mark: good}, 2: {IP: addr("192.0.2.12"), Mark: bad}, 3: {IP: addr("192.0.2.13"), Mark: egress.LocalMark},
			4: {IP: addr("198.51.100.11"), Mark: egress.SubnetMark(3)},
		}},
	}
	have, err := router.Observe()
	if err != nil {
		t.Fatal(err)
	}
	broken := in("routes", router.Apply(routing.Diff(have, d.Routing)))
	vlan := in("addresses", errors.Join(egress.ExitError{VLAN: 7, Err: errors.New("no link")}))
	for _, tt := range []struct {
		ip                         string
		byRoute, byVLAN, byOverall bool
	}{
		{"192.0.2.11", false, false, true}, {"192.0.2.12", true, false, true}, {"192.0.2.13", false, false, true}, {"198.51.100.11", true, true, true},
	} {
		for what, c := range map[string]struct {
			err  error
			want bool
		}{
			"nothing": {nil, false}, "routes": {broken, tt.byRoute}, "the VLAN": {vlan, tt.byVLAN},
			"all of it": {errors.Join(vlan, in("nftables", errors.New("no"))), tt.byOverall},
		} {
			if got := hampers(c.err, d, addr(tt.ip)); got != c.want {
				t.Errorf("%s by %s: %t, want %t (%v)", tt.ip, what, got, c.want, c.err)
			}
		}
	}
}
