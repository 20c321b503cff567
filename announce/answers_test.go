package announce

import (
	"context"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/egret-project/egret/internal/netns"
)

func TestNeighboursThatAreThereAnswerAndOthersDoNot(t *testing.T) {
	netns.Enter(t)
	for _, line := range []string{
		"ip link add eth0 type veth peer name peer0", "ip link set eth0 up", "ip link set peer0 up", "ip addr add 10.10.0.101/24 dev eth0",
		"ip addr add fd10::101/64 dev eth0 nodad", "sysctl -qw net.ipv6.conf.peer0.accept_dad=0",
		// The peer is in this namespace too, and answers for what it has: on a link of its own, that is enough of a
		// neighbour.
		"ip addr add 10.10.0.1/32 dev peer0", "ip -6 addr add fd10::1/128 dev peer0 nodad",
		"sysctl -qw net.ipv4.conf.all.accept_local=1", "sysctl -qw net.ipv4.conf.all.rp_filter=0",
	} {
		netns.Run(t, line)
	}
	there, gone := netip.MustParseAddr("10.10.0.1"), netip.MustParseAddr("10.10.0.9")
	there6, gone6 := netip.MustParseAddr("fd10::1"), netip.MustParseAddr("fd10::9")
	own := netip.MustParseAddr("10.10.0.101")
	ask := func(list ...Neighbour) map[Place]bool {
		t.Helper()
		got, err := Answers(t.Context(), list)
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	// until the links are up
	for end := time.Now().Add(10 * time.Second); len(ask(Neighbour{IP: there6, Link: "eth0"})) == 0; {
		if time.Now().After(end) {
			t.Fatal("the peer does not answer")
		}
	}
	want := map[Place]bool{{there, "eth0"}: true, {there6, "eth0"}: true}
	if diff := cmp.Diff(want, ask(Neighbour{there, "eth0", own}, Neighbour{there6, "eth0", own}), cmpopts.EquateComparable(netip.Addr{})); diff != "" {
		t.Errorf("asked by a node:\n%s", diff)
	}
	best := time.Hour
	for range 20 { // others may use the machine, or it is emulated
		began := time.Now()
		ask(Neighbour{there, "eth0", own}, Neighbour{there6, "eth0", own})
		best = min(best, time.Since(began))
	}
	if best > 2*ProbeGap {
		t.Errorf("answers of all took %v, want no waiting for the three times %v", best, ProbeGap)
	}
	all := []Neighbour{{IP: there, Link: "eth0"}, {gone, "eth0", own}, {IP: there6, Link: "eth0"}, {IP: gone6, Link: "eth0"}, {gone, "eth0", own}}
	if diff := cmp.Diff(want, ask(all...), cmpopts.EquateComparable(netip.Addr{})); diff != "" {
		t.Errorf("beside some that are silent:\n%s", diff)
	}
	if got, err := Answers(t.Context(), []Neighbour{{there, "eth0", own}, {gone, "eth9", own}}); !got[Place{there, "eth0"}] || err == nil {
		t.Errorf("on a link that is not there: %v, %v", got, err)
	}
	netns.Run(t, "ip link add eth1 type veth peer name peer1")
	for _, line := range []string{"ip link set eth1 up", "ip link set peer1 up"} {
		netns.Run(t, line)
	}
	// until eth1 has IPv6
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if _, err := Answers(t.Context(), []Neighbour{{IP: there6, Link: "eth1"}}); err == nil {
			break
		}
	}
	if got := ask(Neighbour{there6, "eth0", own}, Neighbour{there6, "eth1", own}); !got[Place{there6, "eth0"}] || got[Place{there6, "eth1"}] {
		t.Errorf("of two links that have other hosts: %v", got)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if got, err := Answers(ctx, []Neighbour{{gone, "eth0", own}}); len(got) > 0 || err == nil {
		t.Errorf("for nobody: %v, %v", got, err)
	}
}
