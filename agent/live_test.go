package agent

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/egret-project/egret/conntrack"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/nft"
	"github.com/egret-project/egret/plan"
)

// followsAt asks LivePage as anybody may write it, and returns the status and what it says.
func followsAt(a *answerer, query string) (int, string) {
	w := httptest.NewRecorder()
	a.livePage(w, httptest.NewRequest(http.MethodGet, LivePage+"?"+query, nil))
	return w.Code, w.Body.String()
}

func TestPacketsAreFollowedForOneAtATimeAndForNoOtherThanWasAsked(t *testing.T) {
	begun, end := make(chan bool), make(chan bool)
	var fails error
	a := &answerer{node: "a", live: func(context.Context, egress.LiveQuestion) (egress.Live, error) {
		if fails == nil {
			begun <- true
			<-end
		}
		return egress.Live{Node: "a"}, fails
	}, kernel: func(context.Context, egress.KernelQuestion) (egress.Kernel, error) {
		return egress.Kernel{Node: "a"}, nil
	}}
	const good = "ip=10.10.0.11&id=1&pod=10.244.0.5&to=203.0.113.9&protocol=6&port=443"
	for _, bad := range []string{"", strings.Replace(good, "&to=203.0.113.9", "", 1), strings.Replace(good, "203.0.113.9", "fd00::1", 1), strings.Replace(good, "protocol=6", "protocol=58", 1),
		strings.Replace(good, "protocol=6", "protocol=1", 1), strings.Replace(good, "protocol=6", "protocol=262", 1), strings.Replace(good, "port=443", "port=65536", 1),
		strings.Replace(good, "port=443", "port=x", 1), strings.Replace(good, "id=1", "id=0", 1), good + "&pod=" + strings.Repeat("x", 3000) + "&peer=-1",
		good + "&send=1", strings.Replace(good, "&pod=10.244.0.5", "", 1) + "&send=true", strings.Replace(good, "&port=443", "", 1) + "&send=true"} {
		if code, got := followsAt(a, bad); code != http.StatusBadRequest || len(got) > 500 {
			t.Errorf("%.100q: %d %.600s", bad, code, got)
		}
	}
	first := make(chan int)
	go func() { code, _ := followsAt(a, good); first <- code }()
	<-begun
	if code, got := followsAt(a, good); code != http.StatusServiceUnavailable {
		t.Errorf("beside another: %d %s", code, got)
	}
	if code, got := followsAt(a, good+"&node=b"); code != http.StatusOK || strings.TrimSpace(got) != `{"node":"a"}` {
		t.Errorf("for another node: %d %s", code, got)
	}
	if code, got := asks(a, "ip=10.10.0.11&id=1"); code != http.StatusOK {
		t.Errorf("another question meanwhile: %d %s", code, got)
	}
	end <- true
	if code := <-first; code != http.StatusOK {
		t.Errorf("the first: %d", code)
	}
	for err, want := range map[error]int{errNotHere: http.StatusConflict, errProgramming: http.StatusServiceUnavailable, nft.ErrTracing: http.StatusServiceUnavailable,
		nft.ErrNoTrace: http.StatusInternalServerError} {
		fails, a.followed = err, time.Time{}
		if code, got := followsAt(a, good); code != want || !strings.Contains(got, err.Error()) {
			t.Errorf("%v: %d %s", err, code, got)
		}
	}
}

func TestWhoAsksAndHangsUpMakesNoMoreTraces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		traces := 0
		a := &answerer{node: "a", live: func(ctx context.Context, _ egress.LiveQuestion) (egress.Live, error) {
			traces++
			<-ctx.Done() // who asked hung up
			return egress.Live{}, nil
		}}
		for end := time.Now().Add(10 * time.Second); time.Now().Before(end); {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
			w := httptest.NewRecorder()
			a.livePage(w, httptest.NewRequest(http.MethodGet, LivePage+"?ip=10.10.0.11&id=1&to=203.0.113.9&protocol=6&port=0", nil).WithContext(ctx))
			if w.Code == http.StatusServiceUnavailable {
				if got := w.Body.String(); !strings.HasPrefix(got, "the agent rests after a trace: ask again in ") {
					t.Fatal(got)
				}
				time.Sleep(100 * time.Millisecond)
			}
			cancel()
		}
		if traces != 4 {
			t.Errorf("%d traces in 10 s, want one each 3 s", traces)
		}
	})
}

func TestOnlyPacketsOfPodsAndIPsOfTheNodeAreFollowed(t *testing.T) {
	addr := netip.MustParseAddr
	pod, ip, other := addr("10.244.0.5"), addr("10.10.0.11"), addr("10.244.0.6")
	over, there := egress.OverlaySource(1, 7, ip), egress.OverlaySource(2, 7, ip)
	d := plan.Desired{NFT: nft.State{Pods: map[netip.Addr]egress.ID{pod: 7, other: 8}, OverlaySources: map[egress.ID]netip.Addr{7: over},
		Hosted: map[egress.ID]nft.Hosted{7: {IP: ip}}}}
	for name, tt := range map[string]struct {
		q    egress.KernelQuestion
		want []netip.Addr
	}{
		"a pod":                        {egress.KernelQuestion{Pod: pod, IP: ip, ID: 7}, []netip.Addr{ip, pod, over}},
		"the gateway":                  {egress.KernelQuestion{IP: ip, ID: 7, Peer: 2}, []netip.Addr{ip, there}},
		"a pod of another egress":      {egress.KernelQuestion{Pod: other, IP: ip, ID: 7}, nil},
		"an address that is no pod's":  {egress.KernelQuestion{Pod: addr("10.0.0.1"), IP: ip, ID: 7}, nil},
		"an IP of another node":        {egress.KernelQuestion{IP: addr("10.10.0.12"), ID: 9, Peer: 2}, nil},
		"another IP in place of one":   {egress.KernelQuestion{IP: addr("10.10.0.1"), ID: 7, Peer: 2}, nil},
		"an id that is nothing's here": {egress.KernelQuestion{Pod: addr("10.0.0.1"), IP: ip, ID: 99}, nil},
	} {
		got, err := sourcesOf(d, tt.q)
		if diff := cmp.Diff(tt.want, got, cmpopts.EquateComparable(netip.Addr{})); diff != "" || (err == nil) != (tt.want != nil) {
			t.Errorf("%s: %v\n%s", name, err, diff)
		}
	}
	a := &agent{kernel: &kernel{}}
	if _, err := a.follow(t.Context(), egress.LiveQuestion{}); !errors.Is(err, errProgramming) {
		t.Errorf("while the kernel is written to: %v", err)
	}
	a.kernel.programmed.begin()(&d)
	if _, err := a.follow(t.Context(), egress.LiveQuestion{}); !errors.Is(err, errNotHere) {
		t.Errorf("nothing of the node: %v", err)
	}
}

var (
	livePod, liveIP, liveTo          = netip.MustParseAddr("10.244.0.5"), netip.MustParseAddr("10.10.0.11"), netip.MustParseAddr("203.0.113.9")
	liveNode, liveOther, liveForeign = netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("10.0.0.3"), netip.MustParseAddr("10.244.0.6")
)

// steps are made by hand: of packets that a follower of pod 10.244.0.5 and egress IP 10.10.0.11 is told of.
type madeStep struct{ nft.TraceEvent }

func stepOf(packet uint32) madeStep {
	return madeStep{nft.TraceEvent{Packet: packet, Family: "ip", Table: "fw", Chain: "c", Rule: 5, Verdict: "continue"}}
}

func beginOf(packet uint32, what string) madeStep {
	return madeStep{nft.TraceEvent{Packet: packet, Family: "inet", Table: nft.TraceTable, Began: what, Rule: 2}}
}

func (e madeStep) in(chain, verdict string) madeStep { e.Chain, e.Verdict = chain, verdict; return e }
func (e madeStep) by(link int) madeStep              { e.In = link; return e }
func (e madeStep) ends(from netip.Addr, fromPort uint16, to netip.Addr, toPort uint16) madeStep {
	e.Ends = nft.Ends{Protocol: 6, From: from, FromPort: fromPort, To: to, ToPort: toPort}
	return e
}

// seenOf returns what a follower makes of steps, each packet in a line.
func seenOf(l *follower, list ...madeStep) (lines []string, first int) {
	l.sources, l.packets = []netip.Addr{liveIP, livePod}, map[uint32]*packet{}
	for _, e := range list {
		if l.add(e.TraceEvent) {
			first++
		}
	}
	for _, p := range l.list {
		line := fmt.Sprint(p.What, " ", p.Port)
		for _, s := range p.Steps {
			line += " " + s.Chain + " " + s.Verdict
		}
		lines = append(lines, line)
	}
	return lines, first
}

func TestStepsArePutTogetherByPacket(t *testing.T) {
	sent := func(packet uint32, port uint16) madeStep {
		return beginOf(packet, egress.LiveSent).by(71).ends(livePod, port, liveTo, 443)
	}
	got, first := seenOf(&follower{pod: livePod},
		stepOf(9).in("of another trace", "drop"),
		sent(1, 4000), beginOf(2, egress.LiveBack).by(72).ends(liveTo, 443, liveIP, 600), sent(3, 4001),
		stepOf(1).in("a", "accept"),
		stepOf(11).by(71).ends(livePod, 4000, liveTo, 443).in("routed", "accept"), stepOf(11).in("routed", "continue"),
		stepOf(12).by(71).ends(liveIP, 600, liveTo, 443).in("translated", "accept"), // of the latest that it may be
		stepOf(13).by(72).ends(liveTo, 443, livePod, 4000).in("answer", "accept"),
		stepOf(14).by(71).ends(livePod, 4009, liveTo, 443).in("another port", "drop"),
		stepOf(15).by(71).ends(livePod, 4000, liveTo, 80).in("another port of whom it is for", "drop"),
		stepOf(16).by(73).ends(livePod, 4000, liveTo, 443).in("another link", "drop"),
		stepOf(17).by(71).ends(liveForeign, 4000, liveTo, 443).in("another pod", "drop"),
		stepOf(18).by(71).ends(livePod, 4000, liveOther, 443).in("to another", "drop"),
		stepOf(2).in("b", "drop"), stepOf(3).in("of a second packet", "drop"), stepOf(1).in("c", "accept"),
		sent(1, 4002), stepOf(1).in("of a number that is used again", "drop"))
	want := []string{"sent 4000 a accept routed accept routed continue c accept", "back 600 answer accept b drop",
		"sent 4001 translated accept of a second packet drop", "sent 4002 of a number that is used again drop"}
	if diff := cmp.Diff(want, got); diff != "" || first != 1 {
		t.Errorf("began %d times\n%s", first, diff)
	}
}

func TestPacketsOfOtherPodsEndNoWait(t *testing.T) {
	list := []madeStep{
		beginOf(1, egress.LiveBack).ends(liveTo, 443, liveIP, 600), // what comes before the pod sends
		beginOf(2, egress.LiveTunnelIn).ends(liveNode, 50000, liveOther, 8472), beginOf(3, egress.LiveTunnelOut).ends(liveOther, 50001, liveNode, 8472),
		beginOf(4, egress.LiveSent).ends(liveIP, 601, liveTo, 443), // from the overlay
		beginOf(5, egress.LiveSent).ends(livePod, 4000, liveTo, 443),
		beginOf(6, egress.LiveBack).ends(liveTo, 443, liveIP, 602),
		beginOf(7, egress.LiveTunnelIn).ends(liveNode, 50002, liveOther, 8472), beginOf(8, egress.LiveTunnelIn).ends(liveForeign, 50003, liveOther, 8472),
		beginOf(9, egress.LiveTunnelOut).ends(liveOther, 50004, liveNode, 8472), beginOf(10, egress.LiveTunnelOut).ends(liveOther, 50005, liveForeign, 8472),
	}
	got, first := seenOf(&follower{pod: livePod, peer: liveNode}, list...)
	if diff := cmp.Diff([]string{"sent 4000", "back 602", "tunnel_in 50002", "tunnel_out 50004"}, got); diff != "" || first != 1 {
		t.Errorf("on the pod's node: began %d times\n%s", first, diff)
	}
	got, first = seenOf(&follower{peer: liveNode}, list...)
	want := []string{"back 600", "tunnel_in 50000", "tunnel_out 50001", "sent 601", "sent 4000", "back 602", "tunnel_in 50002", "tunnel_out 50004"}
	if diff := cmp.Diff(want, got); diff != "" || first != 0 {
		t.Errorf("on the gateway: began %d times\n%s", first, diff)
	}
}

func TestTheEndOfAPacketIsToldThatMetTooManyRules(t *testing.T) {
	list := []madeStep{beginOf(1, egress.LiveSent).ends(livePod, 4000, liveTo, 443)}
	for range 2 * egress.MaxLiveSteps {
		list = append(list, stepOf(1))
	}
	end := stepOf(1).in("last", "drop")
	end.Out = 1
	l := &follower{pod: livePod}
	seenOf(l, append(list, end)...)
	p := l.list[0]
	if at, dropped := p.Dropped(); len(p.Steps) != egress.MaxLiveSteps || !dropped || at.Chain != "last" || p.Out != "lo" {
		t.Errorf("%d steps, out by %q, the last %+v", len(p.Steps), p.Out, at)
	}
}

func TestTheLastPacketsOfAKindAreKept(t *testing.T) {
	list := []madeStep{beginOf(1000, egress.LiveBack).ends(liveTo, 443, liveIP, 9)}
	for i := range 2 * egress.MaxLivePackets {
		list = append(list, beginOf(uint32(i), egress.LiveSent).ends(liveIP, uint16(i), liveTo, 443))
	}
	got, _ := seenOf(&follower{}, list...)
	if n := len(got); n != egress.MaxLivePackets+1 || got[0] != "back 9" || got[1] != fmt.Sprint("sent ", egress.MaxLivePackets) {
		t.Errorf("%d: %v", n, got)
	}
}

func TestThePortOfAConnectionThatIsRefusedIsThatOfTheAnswer(t *testing.T) {
	l := &follower{pod: livePod}
	seenOf(l, beginOf(1, egress.LiveSent).ends(livePod, 4000, liveTo, 443), beginOf(2, egress.LiveSent).ends(livePod, 4001, liveTo, 443),
		beginOf(3, egress.LiveBack).ends(liveTo, 443, liveIP, 600), stepOf(3).ends(liveTo, 443, livePod, 4000))
	l.translate(nil)
	if a, b := l.list[0].Translated, l.list[1].Translated; a != 600 || b != 0 {
		t.Errorf("ports %d and %d", a, b)
	}
}

func TestThePortOutsideIsThatOfTheConnection(t *testing.T) {
	l := &follower{pod: livePod}
	seenOf(l, beginOf(1, egress.LiveSent).ends(livePod, 4000, liveTo, 443), beginOf(2, egress.LiveSent).ends(livePod, 4001, liveTo, 443),
		beginOf(3, egress.LiveBack).ends(liveTo, 443, liveIP, 4000))
	c := conntrack.Connection{Source: livePod, Destination: liveTo, Translated: liveIP, Protocol: 6, DestinationPort: 443, Port: 600}
	other := c
	other.Source, other.Port = liveForeign, 601
	udp := c
	udp.Protocol, udp.Port = 17, 602
	echo := beginOf(4, egress.LiveSent).ends(livePod, 7, liveTo, 7)
	echo.Protocol = 1
	l.add(echo.TraceEvent)
	ping := conntrack.Connection{Source: livePod, Destination: liveTo, Translated: liveIP, Protocol: 1, Port: 603}
	l.translate([]conntrack.Flow{{Connection: c, SourcePort: 4000}, {Connection: ping, SourcePort: 7}, {Connection: other, SourcePort: 4000}, {Connection: udp, SourcePort: 4000}})
	for i, want := range []uint16{600, 0, 0, 603} {
		if got := l.list[i].Translated; got != want {
			t.Errorf("packet %d: port %d, want %d", i, got, want)
		}
	}
}
