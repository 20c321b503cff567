package agent

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

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
		strings.Replace(good, "port=443", "port=x", 1), strings.Replace(good, "id=1", "id=0", 1), good + "&pod=" + strings.Repeat("x", 3000) + "&peer=-1"} {
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
		fails = err
		if code, got := followsAt(a, good); code != want || !strings.Contains(got, err.Error()) {
			t.Errorf("%v: %d %s", err, code, got)
		}
	}
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

func TestStepsArePutTogetherByPacket(t *testing.T) {
	pod, ip, to, other := netip.MustParseAddr("10.244.0.5"), netip.MustParseAddr("10.10.0.11"), netip.MustParseAddr("203.0.113.9"), netip.MustParseAddr("203.0.113.10")
	l := newFollower(to)
	rule := func(packet uint32, chain, verdict string) nft.TraceEvent {
		return nft.TraceEvent{Packet: packet, Family: "ip", Table: "fw", Chain: chain, Rule: 5, Verdict: verdict}
	}
	begin := func(packet uint32, what string) nft.TraceEvent {
		e := nft.TraceEvent{Packet: packet, Family: "inet", Table: nft.TraceTable, Began: what, Rule: 2, In: 71, From: pod, To: to}
		if what == egress.LiveBack {
			e.In, e.From, e.To = 72, to, ip
		}
		return e
	}
	anew := func(packet uint32, in int, from, to netip.Addr, chain string) nft.TraceEvent {
		e := rule(packet, chain, "accept")
		e.In, e.From, e.To = in, from, to
		return e
	}
	for _, e := range []nft.TraceEvent{rule(9, "of another trace", "drop"), begin(1, egress.LiveSent), begin(2, egress.LiveBack), rule(1, "a", "accept"), anew(11, 71, pod, to, "routed"), rule(11, "routed", "continue"), anew(12, 72, to, pod, "translated"),
		anew(13, 71, pod, other, "of another trace"), anew(14, 71, ip, other, "of another trace"), anew(15, 73, pod, to, "of another link"), rule(2, "b", "drop"),
		begin(3, egress.LiveSent), rule(3, "of a second packet", "drop"), anew(16, 71, pod, to, "of a second packet, routed"), rule(1, "c", "accept"), begin(1, egress.LiveSent), rule(1, "of a number that is used again", "drop")} {
		l.add(e)
	}
	for range 2 * egress.MaxLiveSteps {
		l.add(rule(2, "b", "continue"))
	}
	step := func(chain, verdict string) egress.LiveStep {
		return egress.LiveStep{Table: "ip fw", Chain: chain, Rule: 5, Verdict: verdict}
	}
	if len(l.list) != 2 || len(l.list[1].Steps) != egress.MaxLiveSteps {
		t.Fatalf("%d packets", len(l.list))
	}
	want := []egress.LivePacket{{What: egress.LiveSent, Steps: []egress.LiveStep{step("a", "accept"), step("routed", "accept"), step("routed", "continue"), step("c", "accept")}}, {What: egress.LiveBack, Steps: []egress.LiveStep{step("translated", "accept"), step("b", "drop")}}}
	l.list[1].Steps = l.list[1].Steps[:2]
	if diff := cmp.Diff(want, []egress.LivePacket{*l.list[0], *l.list[1]}); diff != "" {
		t.Error(diff)
	}
}
