package nft

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/mdlayher/netlink"
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
		_, err = Trace(ctx, flow, func() {}, func(e TraceEvent) bool {
			switch {
			case e.Began != "" && first != 0:
				return false // the next one
			case e.Began != "":
				first, got = e.Packet, []string{e.Began + ":"}
			case e.Table != TraceTable && e.Verdict != "":
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
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	ns := netns.Current(t)
	other := make(chan error, 1)
	go func() {
		defer cancel()
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		netns.Switch(t, ns)
		for ctx.Err() == nil { // until the first one is there
			if out, err := exec.Command("nft", "list", "tables").Output(); err == nil && strings.Contains(string(out), TraceTable) {
				break
			}
		}
		second, end := context.WithTimeout(ctx, 5*time.Second)
		defer end()
		c.Write([]byte("x"))
		_, err := Trace(second, flow, func() {}, func(TraceEvent) bool { return true })
		other <- err
	}()
	if _, err := Trace(ctx, flow, func() {}, func(e TraceEvent) bool { t.Errorf("traced %+v", e); return true }); err != nil {
		t.Error(err)
	}
	if err := <-other; !errors.Is(err, ErrTracing) {
		t.Errorf("a second one beside the first: %v", err)
	}
	if got := netns.Run(t, "nft list tables"); got != "" {
		t.Errorf("left behind:\n%s", got)
	}
}

func TestOfTCPOnlyTheBeginningOfAConnectionIsTraced(t *testing.T) {
	netns.Enter(t)
	for _, line := range []string{"ip link set lo up", "ip addr add 10.0.0.1/32 dev lo", "ip addr add 10.0.0.2/32 dev lo"} {
		netns.Run(t, line)
	}
	there, err := net.Listen("tcp4", "10.0.0.2:0")
	if err != nil {
		t.Fatal(err)
	}
	defer there.Close()
	to := there.Addr().(*net.TCPAddr)
	dial := func(port int) (net.Conn, error) {
		return net.DialTCP("tcp4", &net.TCPAddr{IP: net.IPv4(10, 0, 0, 1), Port: port}, to)
	}
	old, err := dial(4000)
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	ns := netns.Current(t)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	go func() {
		runtime.LockOSThread() // which ends with it
		netns.Switch(t, ns)
		for ctx.Err() == nil {
			old.Write([]byte("x"))
			if c, err := dial(4001); err == nil {
				c.(*net.TCPConn).SetLinger(0) // so that the port is free again
				c.Close()
			}
			time.Sleep(20 * time.Millisecond)
		}
	}()
	flow := Flow{Sources: []netip.Addr{netip.MustParseAddr("10.0.0.1")}, Destination: netip.MustParseAddr("10.0.0.2"), Protocol: unix.IPPROTO_TCP, Port: uint16(to.Port)}
	seen := map[string]bool{}
	lost, err := Trace(ctx, flow, func() {}, func(e TraceEvent) bool {
		if e.Began != "" {
			seen[fmt.Sprintf("%s protocol %d %s:%d to %s:%d", e.Began, e.Protocol, e.From, e.FromPort, e.To, e.ToPort)] = true
		}
		return len(seen) < 2
	})
	want := map[string]bool{fmt.Sprintf("sent protocol 6 10.0.0.1:4001 to 10.0.0.2:%d", to.Port): true, fmt.Sprintf("back protocol 6 10.0.0.2:%d to 10.0.0.1:4001", to.Port): true}
	if diff := cmp.Diff(want, seen); diff != "" || lost || err != nil {
		t.Errorf("lost %v, %v\n%s", lost, err, diff)
	}
}

func TestHeadersThatAreCutOffAreNoEnds(t *testing.T) {
	ip4 := append([]byte{0x45, 0, 0, 60, 0, 0, 0, 0, 64, 1, 0, 0}, 10, 0, 0, 1, 10, 0, 0, 2)
	ip6 := append(append([]byte{0x60, 0, 0, 0, 0, 8, 58, 64}, netip.MustParseAddr("fd00::1").AsSlice()...), netip.MustParseAddr("fd00::2").AsSlice()...)
	echo4, reply6, other := []byte{8, 0, 0, 0, 1, 2, 0, 1}, []byte{129, 0, 0, 0, 1, 2, 0, 1}, []byte{3, 0, 0, 0, 1, 2, 0, 1}
	v4 := Ends{Protocol: 1, From: netip.MustParseAddr("10.0.0.1"), To: netip.MustParseAddr("10.0.0.2")}
	v6 := Ends{Protocol: 58, From: netip.MustParseAddr("fd00::1"), To: netip.MustParseAddr("fd00::2")}
	with := func(e Ends, id uint16) Ends { e.FromPort, e.ToPort = id, id; return e }
	for name, tt := range map[string]struct {
		network, transport []byte
		want               Ends
	}{
		"nothing":                 {nil, nil, Ends{}},
		"half of a header":        {ip4[:19], echo4, Ends{}},
		"half of one of IPv6":     {ip6[:39], reply6, Ends{}},
		"no transport":            {ip4, echo4[:7], v4},
		"an echo":                 {ip4, echo4, with(v4, 0x102)},
		"a reply of IPv6":         {ip6, reply6, with(v6, 0x102)},
		"another message of ICMP": {ip4, other, v4},
		"another one of ICMPv6":   {ip6, other, v6},
	} {
		if got := endsOf(tt.network, tt.transport); got != tt.want {
			t.Errorf("%s: %+v, want %+v", name, got, tt.want)
		}
	}
}

func TestAStepWithHalfAVerdictIsNone(t *testing.T) {
	for _, code := range [][]byte{nil, {0}, {0, 0, 0, 0}} {
		ae := netlink.NewAttributeEncoder()
		ae.ByteOrder = binary.BigEndian
		ae.String(unix.NFTA_TRACE_TABLE, "fw")
		ae.Uint64(unix.NFTA_TRACE_RULE_HANDLE, 5)
		ae.Nested(unix.NFTA_TRACE_VERDICT, func(v *netlink.AttributeEncoder) error {
			if code != nil {
				v.Bytes(unix.NFTA_VERDICT_CODE, code)
			}
			return nil
		})
		b, err := ae.Encode()
		if err != nil {
			t.Fatal(err)
		}
		m := netlink.Message{Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_TRACE}, Data: append([]byte{unix.NFPROTO_INET, 0, 0, 0}, b...)}
		if e, ok := decodeTrace(m); ok != (len(code) == 4) || ok && e.Verdict != "drop" {
			t.Errorf("a verdict of %d bytes: %v, %+v", len(code), ok, e)
		}
	}
}
