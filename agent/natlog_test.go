package agent

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"

	"github.com/egret-project/egret/conntrack"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/netns"
	"github.com/egret-project/egret/natlog"
)

// logged is an agent's log in a network namespace, of the pods of a snapshot.
type logged struct {
	t testing.TB
	natLogConfig
	file     string
	snapshot atomic.Pointer[egress.Snapshot]
	inside   func(f func()) // runs f on a thread of the namespace
	buffer   int            // of the socket; 0: as it is
	stop     func()
	size     int // of a file, in MB; 0: 100
}

func newLogged(t testing.TB, cfg NATLog) *logged {
	t.Helper()
	netns.Enter(t)
	ns := netns.Current(t)
	l := &logged{t: t, file: filepath.Join(t.TempDir(), "nat.log")}
	l.inside = func(f func()) {
		done := make(chan struct{})
		go func() {
			defer close(done)
			runtime.LockOSThread()
			netns.Switch(t, ns)
			f()
		}()
		<-done
	}
	ip := netip.MustParseAddr
	pods := []egress.Member{
		{Pod: "prod/web-1", IPs: []netip.Addr{ip("10.244.0.1"), ip("fd44::1")}}, {Pod: "prod/web-2", IPs: []netip.Addr{ip("10.244.0.2")}},
	}
	l.snapshot.Store(&egress.Snapshot{
		Egresses: map[string]egress.Policy{
			"web":   {Name: "web", Addresses: []egress.Address{{IP: ip("203.0.113.5"), ID: 5}, {IP: ip("2001:db8::5"), ID: 6}}},
			"other": {Name: "other", Addresses: []egress.Address{{IP: ip("203.0.113.9"), ID: 9}}},
		},
		Nodes:  map[string]egress.Node{"n1": {Name: "n1", Index: 1}, "n2": {Name: "n2", Index: 258}},
		ByNode: map[string]egress.Members{"web": {Egress: "web", Node: "n1", Pods: pods}, "other": {Egress: "other", Node: "n1", Pods: []egress.Member{{Pod: "dev/x", IPs: []netip.Addr{ip("10.244.0.9")}}}}},
	})
	cfg.File = l.file
	l.natLogConfig = natLogConfig{
		cfg: cfg, node: "n1", version: "test", log: slog.New(slog.DiscardHandler), snapshot: l.snapshot.Load, every: 50 * time.Millisecond,
		listen: func() (e *conntrack.Events, err error) {
			l.inside(func() { e, err = conntrack.Listen(egress.ConnTag, egress.ConnTagMask) })
			if err == nil && l.buffer > 0 {
				err = e.SetReadBuffer(l.buffer)
			}
			return e, err
		},
		list: func() (list []conntrack.Flow, err error) {
			l.inside(func() { list, err = conntrack.Flows(egress.ConnTag, egress.ConnTagMask) })
			return list, err
		},
	}
	return l
}

// The kernel keeps neither by default, and a line without them is the same as one of a kernel that cannot.
func TestTheLogSaysWhatTheKernelDoesNotKeepForIt(t *testing.T) {
	for name, tt := range map[string]struct {
		settings  map[string]string
		want, not []string
	}{
		"neither": {map[string]string{"nf_conntrack_acct": "0\n", "nf_conntrack_timestamp": "0\n"}, []string{
			"level=WARN", "traffic, the kernel's start and stop", "begin after that",
			"sysctl -w net.netfilter.nf_conntrack_acct=1 net.netfilter.nf_conntrack_timestamp=1",
		}, nil},
		"bytes alone": {map[string]string{"nf_conntrack_acct": "1\n", "nf_conntrack_timestamp": "0\n"},
			[]string{"net.netfilter.nf_conntrack_timestamp=1"}, []string{"acct", "traffic"}},
		"both":                   {map[string]string{"nf_conntrack_acct": "1\n", "nf_conntrack_timestamp": "1\n"}, nil, []string{"level"}},
		"a kernel without times": {map[string]string{"nf_conntrack_acct": "1\n"}, nil, []string{"level"}},
	} {
		dir := t.TempDir()
		for setting, value := range tt.settings {
			if err := os.WriteFile(filepath.Join(dir, setting), []byte(value), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		var out bytes.Buffer
		n := &natLogger{natLogConfig: natLogConfig{log: slog.New(slog.NewTextHandler(&out, nil))}}
		n.noteUnkept(dir)
		for _, want := range tt.want {
			if strings.Count(out.String(), want) != 1 {
				t.Errorf("%s: want %q in %q", name, want, out.String())
			}
		}
		for _, not := range tt.not {
			if strings.Contains(out.String(), not) {
				t.Errorf("%s: %q is in %q", name, not, out.String())
			}
		}
	}
}

// start begins to log, and returns when what is there was listed.
func (l *logged) start() {
	l.t.Helper()
	l.cfg.MaxSize = cmp.Or(l.size, 100)
	n, err := newNATLogger(l.natLogConfig)
	if err != nil {
		l.t.Fatal(err)
	}
	ready, hook := make(chan struct{}), n.written
	begun := false
	n.written = func() {
		if hook != nil {
			hook()
		}
		if !begun && n.listing == nil {
			begun = true
			close(ready)
		}
	}
	ctx, cancel := context.WithCancel(l.t.Context())
	done := make(chan error, 1)
	go func() { done <- n.run(ctx) }()
	select {
	case <-ready:
	case <-time.After(20 * time.Second):
		l.t.Fatal("the log has not begun after 20 s")
	}
	l.stop = func() {
		cancel()
		if err := <-done; err != nil {
			l.t.Error(err)
		}
	}
}

// entry is a connection of a pod, as conntrack(8) takes it.
func entry(pod, to, protocol, ports, as string, id int) string {
	return fmt.Sprintf("-s %s -d %s -p %s %s --src-nat %s -m %d", pod, to, protocol, ports, as, egress.ID(id).ConnMark())
}

func tcp(pod string, sport int, to string, as string) string {
	return entry(pod, to, "tcp", fmt.Sprintf("--sport %d --dport 443 --state ESTABLISHED -u SEEN_REPLY", sport), as, 5)
}

// open makes connections in one go.
func (l *logged) open(lines ...string) {
	l.t.Helper()
	l.batch("-A -t 600 ", lines)
}

func (l *logged) batch(do string, lines []string) {
	l.t.Helper()
	file := filepath.Join(l.t.TempDir(), "entries")
	if err := os.WriteFile(file, []byte(do+strings.Join(lines, "\n"+do)+"\n"), 0o600); err != nil {
		l.t.Fatal(err)
	}
	netns.Run(l.t, "conntrack -R "+file)
}

// lines are those of the log: of its own events and losses where own is set.
func (l *logged) lines() (out []natlog.Line) {
	l.t.Helper()
	b, err := os.ReadFile(l.file)
	if err != nil && !os.IsNotExist(err) {
		l.t.Fatal(err)
	}
	for text := range bytes.Lines(b) {
		var is natlog.Line
		if !bytes.HasSuffix(text, []byte("\n")) {
			break // it is being written
		}
		if err := json.Unmarshal(text, &is); err != nil {
			l.t.Fatalf("%q: %v", text, err)
		}
		out = append(out, is)
	}
	return out
}

// count returns how many lines there are of an event.
func (l *logged) count(e natlog.Event) (n int) {
	for _, is := range l.lines() {
		if is.Event == e {
			n++
		}
	}
	return n
}

// until waits for so many lines of an event.
func (l *logged) until(e natlog.Event, n int) {
	l.t.Helper()
	for end := time.Now().Add(30 * time.Second); l.count(e) < n; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			l.t.Fatalf("%d lines of %q after 30 s, want %d: %+v", l.count(e), e, n, l.lines())
		}
	}
}

func brief(l natlog.Line) string {
	return fmt.Sprintf("%s %s %s:%d %s/%s %s:%d %s > %s:%d", l.Event, l.Egress, l.EgressIP, l.Port, l.PodNamespace, l.PodName, l.PodIP, l.PodPort, l.Protocol,
		l.DestinationIP, l.DestinationPort)
}

func TestConnectionsAreLoggedAsTheyBeginAndEnd(t *testing.T) {
	l := newLogged(t, NATLog{})
	l.start()
	l.open(
		tcp("10.244.0.1", 1000, "192.0.2.1", "203.0.113.5:2048"), // one source port, one destination, two pods
		tcp("10.244.0.2", 1000, "192.0.2.1", "203.0.113.5:2049"),
		entry("10.244.0.1", "192.0.2.1", "icmp", "--icmp-type 8 --icmp-code 0 --icmp-id 3000", "203.0.113.5", 5),
		entry("fd44::1", "2001:db8::1", "udp", "--sport 1000 --dport 53", "[2001:db8::5]:2050", 6),
		"-s 10.244.0.1 -d 192.0.2.2 -p udp --sport 1 --dport 2 -m 5", // of no egress
	)
	want := []string{
		"new web 2001:db8::5:2050 prod/web-1 fd44::1:1000 udp > 2001:db8::1:53",
		"new web 203.0.113.5:2048 prod/web-1 10.244.0.1:1000 tcp > 192.0.2.1:443",
		"new web 203.0.113.5:2049 prod/web-2 10.244.0.2:1000 tcp > 192.0.2.1:443",
		"new web 203.0.113.5:3000 prod/web-1 10.244.0.1:3000 icmp > 192.0.2.1:0",
	}
	l.until(natlog.New, len(want))
	l.snapshot.Store(&egress.Snapshot{}) // pods and egress are gone when the connections end
	netns.Run(t, "conntrack -F")
	l.until(natlog.End, len(want))
	l.stop()
	var got []string
	for _, is := range l.lines() {
		switch is.Event {
		case natlog.New:
			got = append(got, brief(is))
		case natlog.End:
			if w := "new" + strings.TrimPrefix(brief(is), "end"); !slices.Contains(want, w) || is.Start.IsZero() || is.Stop.Before(is.Start) || is.Unseen {
				t.Errorf("%s: %+v", w, is)
			}
		}
		if is.Version != 1 || is.Node != "n1" {
			t.Errorf("%+v", is)
		}
	}
	slices.Sort(got)
	if d := gocmp.Diff(want, got); d != "" {
		t.Errorf("begun (-want +got):\n%s", d)
	}
	if l.count(natlog.LogStart) != 1 || l.count(natlog.LogStop) != 1 || l.count(natlog.Lost) != 0 {
		t.Errorf("%+v", l.lines())
	}
}

// TestAPortThatAnotherPodGetsIsTheirsByTime has a port, toward one destination, go from one pod to another.
func TestAPortThatAnotherPodGetsIsTheirsByTime(t *testing.T) {
	l := newLogged(t, NATLog{})
	l.start()
	var between []time.Time
	for i, pod := range []string{"10.244.0.1", "10.244.0.2", "10.244.0.1"} {
		l.open(tcp(pod, 1000, "192.0.2.1", "203.0.113.5:2048"))
		l.until(natlog.New, i+1)
		// moments of their own: times in the log have no better order than the clock's
		time.Sleep(20 * time.Millisecond)
		between = append(between, time.Now())
		time.Sleep(20 * time.Millisecond)
		netns.Run(t, "conntrack -F")
		l.until(natlog.End, i+1)
	}
	for i, pod := range []string{"web-1", "web-2", "web-1"} {
		q := natlog.Question{IP: netip.MustParseAddr("203.0.113.5"), Port: 2048, From: between[i], To: between[i].Add(time.Millisecond)}
		a, err := natlog.SearchFile(t.Context(), q, l.file)
		if err != nil || len(a.Uses) != 1 || a.Uses[0].PodName != pod || len(a.Missing) > 0 {
			t.Errorf("%d: %+v, %v; want %s", i, a, err, pod)
		}
	}
	l.stop()
}

// TestARestartedAgentLogsWhatBeganAndEndedMeanwhile has connections begin and end before, between and after two agents.
func TestARestartedAgentLogsWhatBeganAndEndedMeanwhile(t *testing.T) {
	l := newLogged(t, NATLog{})
	l.open(tcp("10.244.0.1", 1000, "192.0.2.1", "203.0.113.5:2048")) // before the first
	l.start()
	l.until(natlog.Known, 1)
	l.open(tcp("10.244.0.2", 1000, "192.0.2.1", "203.0.113.5:2049"), tcp("10.244.0.2", 1001, "192.0.2.1", "203.0.113.5:2050"))
	l.until(natlog.New, 2)
	l.stop()
	netns.Run(t, "conntrack -D -p tcp --orig-port-src 1001")         // while there is none
	l.open(tcp("10.244.0.1", 1002, "192.0.2.1", "203.0.113.5:2051")) // likewise
	l.start()
	l.until(natlog.Known, 4)
	time.Sleep(20 * time.Millisecond)
	middle := time.Now()
	time.Sleep(20 * time.Millisecond)
	netns.Run(t, "conntrack -F") // the kernel may not tell of some: nobody listened when they began
	l.until(natlog.End, 3)
	l.stop()
	for port, pod := range map[uint16]string{2048: "web-1", 2049: "web-2", 2050: "", 2051: "web-1"} {
		q := natlog.Question{IP: netip.MustParseAddr("203.0.113.5"), Port: port, From: middle, To: middle.Add(time.Millisecond)}
		a, err := natlog.SearchFile(t.Context(), q, l.file)
		got := ""
		for _, u := range a.Uses {
			got += u.PodName
		}
		if err != nil || got != pod || len(a.Missing) > 0 {
			t.Errorf("port %d: %+v, %v; want %q", port, a, err, pod)
		}
	}
	if n := l.count(natlog.End); n != 3 {
		t.Errorf("%d have ended, want 3: %+v", n, l.lines())
	}
}

// TestWhatTheKernelCouldNotTellIsCountedAndFound has more connections than the socket holds, which the agent does not
// read for a while.
func TestWhatTheKernelCouldNotTellIsCountedAndFound(t *testing.T) {
	l := newLogged(t, NATLog{})
	l.buffer = 1
	var hold atomic.Bool
	release := make(chan struct{})
	l.written = func() {
		if hold.Load() {
			<-release
		}
	}
	l.start()
	hold.Store(true)
	const all = 4000
	var lines []string
	for i := range all {
		lines = append(lines, entry("10.244.0.1", fmt.Sprintf("192.0.%d.%d", i/250, i%250), "udp", "--sport 1000 --dport 53", "203.0.113.5:2048", 5))
	}
	l.open(lines...)
	hold.Store(false)
	close(release)
	for end := time.Now().Add(30 * time.Second); l.count(natlog.New)+l.count(natlog.Known) < all; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d new and %d known, want %d in all", l.count(natlog.New), l.count(natlog.Known), all)
		}
	}
	l.buffer = 0
	lost := 0
	for _, is := range l.lines() {
		if lost += int(is.Lost); is.Event == natlog.Lost && is.Reason != natlog.LostSocket {
			t.Errorf("%+v", is)
		}
	}
	if n := l.count(natlog.New); lost == 0 || n+lost != all {
		t.Errorf("%d new, and %d said to be lost, want %d in all", n, lost, all)
	}
	l.stop()
}

func TestFilterAndSampleChooseWholeConnections(t *testing.T) {
	t.Run("filter", func(t *testing.T) {
		l := newLogged(t, NATLog{Filter: []string{"namespace=prod", "namespace=x", "ip=203.0.113.5", "egress=web"}})
		l.start()
		l.open(tcp("10.244.0.1", 1000, "192.0.2.1", "203.0.113.5:2048"),
			// another egress, another namespace
			entry("10.244.0.9", "192.0.2.1", "udp", "--sport 1000 --dport 53", "203.0.113.9:2048", 9),
			entry("fd44::1", "2001:db8::1", "udp", "--sport 1000 --dport 53", "[2001:db8::5]:2050", 6)) // another IP
		l.until(natlog.New, 1)
		netns.Run(t, "conntrack -F")
		l.until(natlog.End, 1)
		l.stop()
		if n := len(l.lines()); n != 4 { // with the beginning and the end of the log
			t.Errorf("%+v", l.lines())
		}
	})
	t.Run("sample", func(t *testing.T) {
		l := newLogged(t, NATLog{Sample: 10})
		l.start()
		var lines []string
		for i := range 3000 {
			lines = append(lines, tcp("10.244.0.1", 1000+i, "192.0.2.1", fmt.Sprintf("203.0.113.5:%d", 2048+i)))
		}
		l.open(lines...)
		l.open(tcp("10.244.0.1", 999, "192.0.2.1", "203.0.113.5:2047"))
		l.until(natlog.New, 200)
		await(t, time.Second) // some are to come
		l.stop()
		l.start() // an agent that chose others would log ends without a beginning
		netns.Run(t, "conntrack -F")
		l.until(natlog.End, 200)
		await(t, time.Second)
		l.stop()
		began, ended := map[uint16]bool{}, map[uint16]bool{}
		for _, is := range l.lines() {
			switch is.Event {
			case natlog.New:
				began[is.Port] = true
			case natlog.End:
				ended[is.Port] = true
			}
			if is.Port > 0 && is.Sample != 10 {
				t.Fatalf("%+v", is)
			}
		}
		if n := len(began); n < 200 || n > 400 { // 300, and 16 is the standard deviation
			t.Errorf("%d of 3001 are logged", n)
		}
		if d := gocmp.Diff(began, ended); d != "" {
			t.Errorf("what began is not what ended:\n%s", d)
		}
	})
}

// TestWhatTheGatewayTranslatesIsFoundByItsOverlayAddress has the lines of both nodes of a connection of a node without
// ports.
func TestWhatTheGatewayTranslatesIsFoundByItsOverlayAddress(t *testing.T) {
	l := newLogged(t, NATLog{})
	l.start()
	l.open(entry("10.244.0.1", "192.0.2.1", "udp", "--sport 1000 --dport 53", "0.5.0.1:1000", 5), // of this node's pod
		entry("0.5.1.2", "192.0.2.1", "udp", "--sport 1000 --dport 53", "203.0.113.5:1024", 5)) // of that of node 258
	l.until(natlog.New, 2)
	l.stop()
	for _, is := range l.lines() {
		if is.Event != natlog.New {
			continue
		}
		if is.PodNode == "" {
			if is.PodName != "web-1" || is.OverlayIP.String() != "0.5.0.1" || is.OverlayPort != 1000 || is.Port != 0 || is.EgressIP.String() != "203.0.113.5" {
				t.Errorf("%+v", is)
			}
		} else if is.PodNode != "n2" || is.OverlayIP.String() != "0.5.1.2" || is.Port != 1024 || is.PodIP.IsValid() || is.Egress != "web" {
			t.Errorf("%+v", is)
		}
	}
}

// TestMoreConnectionsThanAreRememberedAreLogged has room for ten.
func TestMoreConnectionsThanAreRememberedAreLogged(t *testing.T) {
	l := newLogged(t, NATLog{})
	l.most = 10
	l.start()
	var lines []string
	for i := range 100 {
		lines = append(lines, tcp("10.244.0.1", 1000+i, "192.0.2.1", fmt.Sprintf("203.0.113.5:%d", 2048+i)))
	}
	l.open(lines...)
	l.until(natlog.New, 100)
	netns.Run(t, "conntrack -F")
	l.until(natlog.End, 100)
	l.stop()
	for _, is := range l.lines() {
		if is.Event == natlog.End && is.PodName != "web-1" {
			t.Errorf("%+v", is)
		}
	}
	if n := l.count(natlog.New); n != 100 {
		t.Errorf("%d new", n)
	}
}

// The first listing of an agent tells of all that are there, also of those that there is no room for, and no later one
// does again.
func TestConnectionsThatAreNotRememberedAreListedOnce(t *testing.T) {
	l := newLogged(t, NATLog{})
	l.most, l.every = 10, 50*time.Millisecond
	var lines []string
	for i := range 100 {
		lines = append(lines, tcp("10.244.0.1", 1000+i, "192.0.2.1", fmt.Sprintf("203.0.113.5:%d", 2048+i)))
	}
	l.open(lines...)
	l.start()
	l.until(natlog.Known, 100)
	await(t, 500*time.Millisecond)
	l.stop()
	if n := l.count(natlog.Known); n != 100 {
		t.Errorf("%d lines of 100 connections", n)
	}
}
