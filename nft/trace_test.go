package nft

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/internal/netns"
)

func TestTraceTellsWhichRuleOfWhomDropsAPacket(t *testing.T) {
	netns.Enter(t)
	for _, line := range []string{"ip link set lo up", "ip addr add 10.0.0.1/32 dev lo", "ip addr add 10.0.0.2/32 dev lo", "ip addr add fd00::1/128 dev lo", "ip addr add fd00::2/128 dev lo",
		"nft add table ip fw", "nft add chain ip fw in { type filter hook input priority 0; }", "nft add rule ip fw in udp dport 9 counter", "nft add rule ip fw in udp dport 9 drop",
		"nft add table ip6 fw", "nft add chain ip6 fw in { type filter hook input priority 0; policy drop; }"} {
		netns.Run(t, line)
	}
	for _, tt := range []struct {
		from, to string
		port     int
		want     string
	}{
		{"10.0.0.1", "10.0.0.2", 9, "sent: ip fw in rule continue, ip fw in rule drop"},
		{"10.0.0.1", "10.0.0.2", 7, "sent: ip fw in policy accept"},
		{"fd00::1", "fd00::2", 9, "sent: ip6 fw in policy drop"},
	} {
		from, to := netip.MustParseAddr(tt.from), netip.MustParseAddr(tt.to)
		before := netns.Run(t, "nft -s list ruleset")
		c, err := net.DialUDP("udp", &net.UDPAddr{IP: from.AsSlice()}, &net.UDPAddr{IP: to.AsSlice(), Port: tt.port})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		go func() {
			for ctx.Err() == nil {
				c.Write([]byte("x")) // it is refused, or dropped
				time.Sleep(20 * time.Millisecond)
			}
		}()
		var got []string
		first := uint32(0)
		flow := Flow{Sources: []netip.Addr{netip.MustParseAddr("10.0.0.9"), from}, Destination: to, Protocol: unix.IPPROTO_UDP, Port: uint16(tt.port)}
		if to.Is6() {
			flow.Sources = []netip.Addr{from}
		}
		err = Trace(ctx, flow, func(e TraceEvent) bool {
			switch {
			case e.Began != "" && first != 0:
				return false // the next one
			case e.Began != "":
				first, got = e.Packet, []string{e.Began + ":"}
			case e.Table != TraceTable:
				what := "policy"
				if e.Rule != 0 {
					what = "rule"
				}
				got = append(got, fmt.Sprintf("%s %s %s %s %s,", e.Family, e.Table, e.Chain, what, e.Verdict))
			}
			return true
		})
		cancel()
		if text := strings.TrimSuffix(strings.Join(got, " "), ","); err != nil || text != tt.want {
			t.Errorf("%s to %s: %v %q, want %q", tt.from, tt.to, err, text, tt.want)
		}
		c.Close()
		if after := netns.Run(t, "nft -s list ruleset"); after != before {
			t.Errorf("left behind:\n%s", after)
		}
	}
}

func TestTwoTracesDoNotRunAtOnceAndNobodyTracesOthersPackets(t *testing.T) {
	netns.Enter(t)
	for _, line := range []string{"ip link set lo up", "ip addr add 10.0.0.1/32 dev lo", "ip addr add 10.0.0.2/32 dev lo"} {
		netns.Run(t, line)
	}
	flow := Flow{Sources: []netip.Addr{netip.MustParseAddr("10.0.0.1")}, Destination: netip.MustParseAddr("10.0.0.2"), Protocol: unix.IPPROTO_UDP, Port: 9}
	c, err := net.DialUDP("udp", &net.UDPAddr{IP: net.IPv4(10, 0, 0, 1)}, &net.UDPAddr{IP: net.IPv4(10, 0, 0, 2), Port: 10})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	ns := netns.Current(t)
	other := make(chan error)
	go func() {
		time.Sleep(100 * time.Millisecond)
		netns.Switch(t, ns)
		c.Write([]byte("x"))
		other <- Trace(ctx, flow, func(TraceEvent) bool { return true })
	}()
	if err := Trace(ctx, flow, func(e TraceEvent) bool { t.Errorf("traced %+v", e); return true }); err != nil {
		t.Error(err)
	}
	if err := <-other; !errors.Is(err, ErrTracing) {
		t.Errorf("a second one beside the first: %v", err)
	}
	if got := netns.Run(t, "nft list tables"); got != "" {
		t.Errorf("left behind:\n%s", got)
	}
}
