package agent

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/conntrack"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/natlog"
)

// answers asks a page, and returns the status and what it says: pods and destinations, or the error.
func answers(t *testing.T, page http.HandlerFunc, q natlog.Question) (code int, text string) {
	t.Helper()
	// on a busy machine a question takes long, and the agent rests then
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		if code, text = answersAtOnce(t, page, q); code != http.StatusServiceUnavailable || time.Now().After(end) {
			return code, text
		}
	}
}

func answersAtOnce(t *testing.T, page http.HandlerFunc, q natlog.Question) (int, string) {
	t.Helper()
	w := httptest.NewRecorder()
	page(w, httptest.NewRequest(http.MethodGet, "/?"+q.Query().Encode(), nil))
	if w.Code != http.StatusOK {
		return w.Code, w.Body.String()
	}
	var r natlog.Reply
	if err := json.Unmarshal(w.Body.Bytes(), &r); err != nil || r.Node != "n1" {
		t.Fatalf("%+v, %v", r, err)
	}
	var out []string
	for _, u := range r.Uses {
		out = append(out, fmt.Sprintf("%s %s:%d", u.PodName, u.DestinationIP, u.DestinationPort))
	}
	return w.Code, strings.Join(append(out, r.Missing...), ", ")
}

func TestWhoHasAPortIsToldByTheKernelAndWhoHadItByTheLog(t *testing.T) {
	l := newLogged(t, NATLog{})
	l.start()
	l.open(tcp("10.244.0.1", 1000, "192.0.2.1", "203.0.113.5:2048"), tcp("10.244.0.2", 1000, "192.0.2.2", "203.0.113.5:2048"),
		tcp("10.244.0.2", 1000, "192.0.2.3", "203.0.113.5:2049"),
		entry("10.244.0.9", "192.0.2.1", "udp", "--sport 1000 --dport 53", "203.0.113.9:2048", 9))
	l.until(natlog.New, 4)
	now := time.Now()
	log := &natLogger{natLogConfig: l.natLogConfig}
	a := &answerer{node: "n1", snapshot: l.snapshot.Load, log: log, list: func(m egress.Mark) (list []conntrack.Flow, err error) {
		l.inside(func() { list, err = conntrack.Flows(m, ^egress.Mark(0)) })
		return list, err
	}}
	q := natlog.Question{IP: netip.MustParseAddr("203.0.113.5"), Port: 2048, From: now, To: now.Add(time.Second)}
	both := "web-1 192.0.2.1:443, web-2 192.0.2.2:443"
	if code, got := answers(t, a.connections, q); got != both {
		t.Errorf("the kernel: %d %q, want %q", code, got, both)
	}
	if code, got := answers(t, a.natLog, q); got != both {
		t.Errorf("the log: %d %q, want %q", code, got, both)
	}
	for port, want := range map[uint16]string{2049: "web-2 192.0.2.3:443", 2050: ""} {
		other := q
		other.Port = port
		if code, got := answers(t, a.connections, other); got != want {
			t.Errorf("port %d: %d %q, want %q", port, code, got, want)
		}
	}
	chosen := q
	chosen.Destination, chosen.Protocol = netip.MustParseAddr("192.0.2.2"), "tcp"
	for _, page := range []func(http.ResponseWriter, *http.Request){a.connections, a.natLog} {
		if code, got := answers(t, page, chosen); got != "web-2 192.0.2.2:443" {
			t.Errorf("to one destination: %d %q", code, got)
		}
	}
	before := q
	before.From, before.To = now.Add(-time.Hour), now.Add(-time.Hour+time.Second)
	if code, got := answers(t, a.natLog, before); !strings.HasPrefix(got, "the log begins at") {
		t.Errorf("before the log: %d %q", code, got)
	}
	log.cfg.Sample = 10
	if _, got := answers(t, a.natLog, q); !strings.Contains(got, "one in 10") {
		t.Errorf("a log of a sample: %q", got)
	}
	for name, cfg := range map[string]string{"--nat-log": "", "--log": StandardOutput} {
		a.log, log.cfg.File = log, cfg
		if cfg == "" {
			a.log = nil
		}
		if code, got := answers(t, a.natLog, q); code != http.StatusNotFound || !strings.Contains(got, name) {
			t.Errorf("no log to be read: %d %q, want one with %s", code, got, name)
		}
	}
	for _, bad := range []string{"", "ip=x&port=1&from=x&to=y", "ip=203.0.113.5&port=70000&from=2026-11-28T12:00:00Z&to=2026-11-28T12:00:01Z",
		"ip=203.0.113.5&port=7000&from=2026-11-28T12:00:01Z&to=2026-11-28T12:00:01Z"} {
		w := httptest.NewRecorder()
		if a.connections(w, httptest.NewRequest(http.MethodGet, "/?"+bad, nil)); w.Code != http.StatusBadRequest {
			t.Errorf("%q: %d %s", bad, w.Code, w.Body)
		}
	}
	l.stop()
}

// A gateway that translates for another node's pod has its overlay address and port, and asks that node whose they are.
func TestAPodsNodeSaysWhichPodHasAnOverlayAddress(t *testing.T) {
	web, mail := netip.MustParseAddr("203.0.113.5"), netip.MustParseAddr("203.0.113.6")
	pod := netip.MustParseAddr("10.244.0.1")
	s := &egress.Snapshot{
		Nodes: map[string]egress.Node{"n1": {Name: "n1", Index: 7}},
		Egresses: map[string]egress.Policy{
			"web": {Name: "web", Addresses: []egress.Address{{IP: web, ID: 5}}}, "mail": {Name: "mail", Addresses: []egress.Address{{IP: mail, ID: 6}}},
		},
		ByNode: map[string]egress.Members{"web": {Egress: "web", Node: "n1", Pods: []egress.Member{{Pod: "prod/web-1", IPs: []netip.Addr{pod}}}}},
	}
	flow := func(port uint16) conntrack.Flow {
		return conntrack.Flow{SourcePort: 1000, Connection: conntrack.Connection{
			Source: pod, Translated: egress.OverlaySource(7, 5, web), Port: port, Protocol: 6, Mark: egress.ID(5).ConnMark(),
			Destination: netip.MustParseAddr("192.0.2.1"), DestinationPort: 443,
		}}
	}
	a := &answerer{node: "n1", snapshot: func() *egress.Snapshot { return s }, list: func(m egress.Mark) ([]conntrack.Flow, error) {
		if m != egress.ID(5).ConnMark() {
			return nil, nil
		}
		return []conntrack.Flow{flow(1000), flow(1001)}, nil
	}}
	now := time.Now()
	for of, want := range map[netip.AddrPort]string{
		netip.MustParseAddrPort("0.5.0.7:1000"): "web-1 192.0.2.1:443",
		netip.MustParseAddrPort("0.5.0.7:1002"): "",
		netip.MustParseAddrPort("0.6.0.7:1000"): "",
		netip.MustParseAddrPort("0.5.0.8:1000"): "", // it is another node's
	} {
		q := natlog.Question{IP: of.Addr(), Port: of.Port(), From: now, To: now.Add(time.Second)}
		if code, got := answers(t, a.connections, q); code != http.StatusOK || got != want {
			t.Errorf("%s: %d %q, want %q", of, code, got, want)
		}
	}
}

// TestQuestionsTakeTurnsAndTheAgentRests asks while a listing goes on, and after one that took long.
func TestQuestionsTakeTurnsAndTheAgentRests(t *testing.T) {
	s := &egress.Snapshot{Egresses: map[string]egress.Policy{"web": {Addresses: []egress.Address{{IP: netip.MustParseAddr("203.0.113.5"), ID: 5}}}}}
	begun, end := make(chan bool), make(chan bool)
	a := &answerer{node: "n1", snapshot: func() *egress.Snapshot { return s }, list: func(egress.Mark) ([]conntrack.Flow, error) {
		begun <- true
		<-end
		return nil, nil
	}}
	q := natlog.Question{IP: netip.MustParseAddr("203.0.113.5"), Port: 2048, From: time.Now(), To: time.Now().Add(time.Second)}
	first := make(chan int)
	go func() { code, _ := answers(t, a.connections, q); first <- code }()
	<-begun
	if code, got := answersAtOnce(t, a.connections, q); code != http.StatusServiceUnavailable {
		t.Errorf("beside another: %d %s", code, got)
	}
	time.Sleep(150 * time.Millisecond) // it takes long
	end <- true
	if code := <-first; code != http.StatusOK {
		t.Errorf("the first: %d", code)
	}
	if code, got := answersAtOnce(t, a.connections, q); code != http.StatusServiceUnavailable || !strings.Contains(got, "rests") {
		t.Errorf("right after it: %d %s", code, got)
	}
}
