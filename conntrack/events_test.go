package conntrack

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/netns"
)

// listen returns the events of Egret's connections.
func listen(t testing.TB) *Events {
	t.Helper()
	e, err := Listen(egress.ConnTag, egress.ConnTagMask)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Close() })
	return e
}

// next reads events until there are so many, those that are lost included.
func next(t testing.TB, e *Events, n int) (began, ended []Flow, lost int) {
	t.Helper()
	stop := time.AfterFunc(20*time.Second, func() { e.Close() })
	defer stop.Stop()
	for len(began)+len(ended)+lost < n {
		more, err := e.Receive(func(f *Flow) { began = append(began, *f) }, func(f *Flow) { ended = append(ended, *f) })
		if lost += more; err != nil {
			t.Fatalf("after %d, %d and %d lost: %v", len(began), len(ended), lost, err)
		}
	}
	return began, ended, lost
}

func brief(list []Flow) (out []string) {
	for _, f := range list {
		out = append(out, fmt.Sprintf("%s:%d > %s:%d as %s:%d, %d, mark %s", f.Source, f.SourcePort, f.Destination, f.DestinationPort, f.Translated, f.Port, f.Protocol, f.Mark))
	}
	slices.Sort(out)
	return out
}

func TestEventsAreThoseOfTheMarkAlone(t *testing.T) {
	netns.Enter(t)
	e := listen(t)
	tag := egress.ID(5).ConnMark()
	lines := []string{
		fmt.Sprintf("-s 10.0.0.1 -d 192.0.2.7 -p tcp --sport 1000 --dport 80 --state ESTABLISHED --src-nat 192.0.2.9:2048 -m %d", tag),
		fmt.Sprintf("-s 10.0.0.1 -d 192.0.2.7 -p icmp --icmp-type 8 --icmp-code 0 --icmp-id 7 -m %d", tag),
		fmt.Sprintf("-s fd00::1 -d 2001:db8::1 -p udp --sport 1000 --dport 53 -m %d", egress.ID(6).ConnMark()),
	}
	fill(t, append(others(300), lines...)) // the others have marks of 0 to 6
	fill(t, []string{
		// the number, without the tag
		fmt.Sprintf("-s 10.0.0.2 -d 192.0.2.7 -p udp --sport 1 --dport 2 -m %d", 5),
		fmt.Sprintf("-s 10.0.0.2 -d 192.0.2.7 -p udp --sport 1 --dport 3 -m %d", 0x1e9e0005),     // another's tag
		fmt.Sprintf("-s 10.0.0.3 -d 192.0.2.7 -p udp --sport 1 --dport 2 -m %d", egress.ConnTag), // no number
	})
	want := []string{
		"10.0.0.1:1000 > 192.0.2.7:80 as 192.0.2.9:2048, 6, mark 0xe9e0005",
		"10.0.0.1:7 > 192.0.2.7:0 as 10.0.0.1:7, 1, mark 0xe9e0005",
		"10.0.0.3:1 > 192.0.2.7:2 as 10.0.0.3:1, 17, mark 0xe9e0000",
		"fd00::1:1000 > 2001:db8::1:53 as fd00::1:1000, 17, mark 0xe9e0006",
	}
	began, ended, lost := next(t, e, len(want))
	if d := cmp.Diff(want, brief(began)); d != "" || len(ended) > 0 || lost > 0 {
		t.Errorf("began, with %v ended and %d lost (-want +got):\n%s", ended, lost, d)
	}
	list, err := Flows(egress.ConnTag, egress.ConnTagMask)
	if d := cmp.Diff(want, brief(list)); d != "" || err != nil {
		t.Errorf("listed: %v (-want +got):\n%s", err, d)
	}
	ids := map[uint32]bool{}
	for _, f := range slices.Concat(began, list) {
		ids[f.ID] = true
	}
	netns.Run(t, "conntrack -F")
	began, ended, lost = next(t, e, len(want))
	if d := cmp.Diff(want, brief(ended)); d != "" || len(began) > 0 || lost > 0 {
		t.Errorf("ended, with %v begun and %d lost (-want +got):\n%s", began, lost, d)
	}
	for _, f := range ended {
		ids[f.ID] = true
	}
	if len(ids) != len(want) {
		t.Errorf("the ids %v are not those of %d connections", ids, len(want))
	}
}

// TestEventsThatNobodyReadInTimeAreCounted has a socket with room for a few.
func TestEventsThatNobodyReadInTimeAreCounted(t *testing.T) {
	netns.Enter(t)
	e := listen(t)
	if err := e.nl.SetReadBuffer(1); err != nil { // the least there is
		t.Fatal(err)
	}
	const all = 1000
	for round := range 3 {
		var lines []string
		for i := range all {
			lines = append(lines, fmt.Sprintf("-s 10.0.%d.%d -d 192.0.2.1 -p udp --sport %d --dport 53 -m %d", i/250, i%250, 1000+round, egress.ID(5).ConnMark()))
		}
		fill(t, append(lines, others(500)...)) // which are not lost to anybody
		netns.Run(t, "conntrack -D -p udp --dport 53 --mark 1")
		began, _, lost := next(t, e, all)
		if len(began)+lost != all || lost == 0 || len(began) == 0 {
			t.Errorf("round %d: %d events came and %d were lost, want %d in all and some of both", round, len(began), lost, all)
		}
		netns.Run(t, "conntrack -D -p udp --dport 53 --mark 0")
		netns.Run(t, "conntrack -F")
		next(t, e, all)
	}
}

// TestFlowsAreCountedAndTimed has packets of a socket.
func TestFlowsAreCountedAndTimed(t *testing.T) {
	netns.Enter(t)
	netns.RunAll(t, "", "sysctl -qw net.netfilter.nf_conntrack_acct=1\nsysctl -qw net.netfilter.nf_conntrack_timestamp=1")
	netns.Run(t, "nft add table inet t")
	netns.Run(t, "nft add chain inet t out { type filter hook output priority 0 ; }")
	netns.Run(t, fmt.Sprintf("nft add rule inet t out ct state new ct mark set %d", egress.ID(9).ConnMark()))
	e := listen(t)
	before := time.Now()
	server, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	client, err := net.DialUDP("udp4", nil, server.LocalAddr().(*net.UDPAddr))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	buf := make([]byte, 100)
	for range 2 {
		if _, err := client.Write(buf); err != nil {
			t.Fatal(err)
		}
		if _, from, err := server.ReadFromUDP(buf); err != nil {
			t.Fatal(err)
		} else if _, err := server.WriteToUDP(buf[:10], from); err != nil {
			t.Fatal(err)
		}
	}
	netns.Run(t, "conntrack -F")
	began, ended, _ := next(t, e, 2)
	if len(began) != 1 || len(ended) != 1 {
		t.Fatalf("began %v, ended %v", began, ended)
	}
	f := ended[0]
	if want := (Count{2, 2 * 128}); !f.Counted || f.Sent != want || f.Received != (Count{2, 2 * 38}) || !f.Replied || began[0].Replied {
		t.Errorf("%+v", f)
	}
	if f.Start.Before(before.Add(-time.Second)) || f.Stop.Before(f.Start) || f.Stop.After(time.Now().Add(time.Second)) {
		t.Errorf("from %v to %v, want from %v on", f.Start, f.Stop, before)
	}
}

func TestCloseEndsReceive(t *testing.T) {
	netns.Enter(t)
	e := listen(t)
	done := make(chan error, 1)
	go func() {
		_, err := e.Receive(nil, nil)
		done <- err
	}()
	time.AfterFunc(50*time.Millisecond, func() { e.Close() })
	if err := <-done; !errors.Is(err, os.ErrClosed) {
		t.Errorf("%v, want that it is closed", err)
	}
}

func TestListenNamesTheSysctlOfAKernelThatSendsNoEvents(t *testing.T) {
	netns.Enter(t)
	netns.RunAll(t, "", "sysctl -qw net.netfilter.nf_conntrack_events=0")
	if e, err := Listen(egress.ConnTag, egress.ConnTagMask); err == nil || !strings.Contains(err.Error(), "nf_conntrack_events=1") {
		t.Errorf("%v, %v: want an error with the setting", e, err)
	}
}

// TestWhatIsCutOffIsAnError cuts an event at each byte, and changes each: nothing panics.
func TestWhatIsCutOffIsAnError(t *testing.T) {
	netns.Enter(t)
	e := listen(t)
	connect(t, "10.0.0.1", "10.0.0.2", egress.ID(5).ConnMark(), "--src-nat 192.0.2.9")
	var n int
	err := e.raw.Read(func(fd uintptr) (done bool) {
		var err error
		n, err = unix.Read(int(fd), e.buf)
		return err == nil
	})
	if err != nil {
		t.Fatal(err)
	}
	whole := slices.Clone(e.buf[:n])
	nothing := func(*Flow) {}
	if err := e.parse(whole, &Flow{}, nothing, nothing); err != nil {
		t.Fatal(err)
	}
	for i := range whole {
		_ = e.parse(slices.Clip(whole[:i]), &Flow{}, nothing, nothing)
		for _, b := range []byte{0, 1, 0x7f, 0xff} {
			bad := slices.Clone(whole)
			bad[i] = b
			_ = e.parse(bad, &Flow{}, nothing, nothing)
		}
	}
	if err := decode(whole[20:n-1], &Flow{}); err == nil {
		t.Error("what is cut off is taken for whole")
	}
}
