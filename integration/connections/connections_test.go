package connections

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/egret-project/egret/integration/lab"
	"github.com/egret-project/egret/internal/need"
)

func TestMain(m *testing.M) {
	if status, ok := lab.Helper(os.Args); ok {
		os.Exit(status)
	}
	os.Exit(m.Run())
}

func config() Config {
	return Config{
		Lab: lab.Config{Nodes: 4}, Fault: "move", Family: 4, Connections: 50, Pods: 2, OwnPorts: true, Interval: 100 * time.Millisecond, Wait: time.Second,
	}
}

// damage lets one connection of each kind die, all of the first pod, while the IP is moved: the pod's segments of TCP
// get lost, the server resets a push, UDP and QUIC get other source ports, echo replies get lost.
func damage(t *testing.T) func(*bench, context.Context) error {
	return func(b *bench, ctx context.Context) error {
		ports := map[Kind]uint16{}
		for _, c := range b.traffic.connections {
			if _, ok := ports[c.kind]; c.pod != 0 || ok {
				continue
			}
			ports[c.kind] = c.port
			if c.kind == Push {
				b.traffic.mu.Lock()
				conn := b.traffic.pushed[c].(*net.TCPConn)
				b.traffic.mu.Unlock()
				if err := errors.Join(conn.SetLinger(0), conn.Close()); err != nil {
					t.Error(err)
				}
			}
		}
		rules := fmt.Sprintf(`table ip damage {
			chain output {
				type filter hook output priority filter
				tcp sport %d drop
				udp sport %d udp sport set 61000
				udp sport %d udp sport set 61001
			}
			chain input {
				type filter hook input priority filter
				udp dport 61000 udp dport set %[2]d
				udp dport 61001 udp dport set %[3]d
				icmp type echo-reply icmp id %[4]d drop
			}
		}`, ports[TCP], ports[UDP], ports[QUIC], ports[ICMP])
		if _, err := b.lab.Exec(ctx, "pod", b.pods[0], "nft", rules); err != nil {
			return err
		}
		return b.inject(ctx)
	}
}

func TestAPlannedMoveBreaksNoConnectionButTheDamagedOnesWhichAreCounted(t *testing.T) {
	need.Root(t)
	need.KubeProgram(t, "kube-apiserver")
	cfg := config()
	cfg.Lab.Name = lab.OwnName("connections")
	r, err := run(t.Context(), cfg, damage(t))
	if err != nil {
		t.Fatal(err)
	}
	var table strings.Builder
	if err := r.WriteTable(&table); err != nil {
		t.Fatal(err)
	}
	t.Logf("\n%s", &table)
	if r.From == r.To || len(r.Results) != cfg.Connections {
		t.Errorf("moved from %s to %s with %d connections, want it moved with %d", r.From, r.To, len(r.Results), cfg.Connections)
	}
	const of = 10 // each kind
	for _, s := range r.Summaries() {
		if s.Connections != of || s.Established != of {
			t.Errorf("%s: %d of %d connections are established, want %d of both", s.Kind, s.Established, s.Connections, of)
		}
		if s.Kind == Push {
			// A move may break others: a gateway without a conntrack entry of a connection drops what only the server
			// says.
			if s.Alive >= of || s.Errors < 1 || s.Resets < 1 {
				t.Errorf("push: %d alive, %d with errors, %d resets: want the one that the server reset counted", s.Alive, s.Errors, s.Resets)
			}
			continue
		}
		if s.Alive != of-1 {
			t.Errorf("%s: %d alive, want all but one of %d", s.Kind, s.Alive, of)
		}
		if len(s.First) != s.Alive || len(s.Silence) != s.Alive {
			t.Errorf("%s: %d first bytes and %d silences of %d that are alive", s.Kind, len(s.First), len(s.Silence), s.Alive)
		}
		if want := count(s.Kind == UDP || s.Kind == QUIC); s.Kind != ICMP && s.Changed != want {
			t.Errorf("%s: %d changed source ports, want %d", s.Kind, s.Changed, want)
		}
	}
	for _, want := range []struct {
		percent float64
		kinds   []Kind
	}{{0, nil}, {100, Kinds}} {
		err := r.Require(want.percent)
		if (err == nil) != (want.kinds == nil) {
			t.Errorf("%g %% required: error %v", want.percent, err)
		}
		for _, kind := range want.kinds {
			if !strings.Contains(err.Error(), string(kind)+": ") {
				t.Errorf("%g %% required: error %v, want it to name %s", want.percent, err, kind)
			}
		}
	}
}

func TestPodsHaveTheSameSourcePortsOrTheirOwn(t *testing.T) {
	for _, own := range []bool{false, true} {
		cfg := config()
		cfg.OwnPorts = own
		kinds, pods, users := map[Kind]int{}, map[int]int{}, map[uint16][]Kind{}
		for i, c := range plan(cfg) {
			if c.id != uint64(i) {
				t.Fatalf("connection %d has the id %d", i, c.id)
			}
			kinds[c.kind]++
			pods[c.pod]++
			users[c.port] = append(users[c.port], c.kind)
		}
		if diff := cmp.Diff(map[Kind]int{TCP: 10, Push: 10, UDP: 10, QUIC: 10, ICMP: 10}, kinds); diff != "" {
			t.Errorf("own ports %t: kinds (-want +got):\n%s", own, diff)
		}
		if diff := cmp.Diff(map[int]int{0: 25, 1: 25}, pods); diff != "" {
			t.Errorf("own ports %t: pods (-want +got):\n%s", own, diff)
		}
		want := 2
		if own {
			want = 1
		}
		for port, kinds := range users {
			if len(kinds) != want || kinds[0] != kinds[len(kinds)-1] {
				t.Errorf("own ports %t: port %d is of %q, want %d of one kind", own, port, kinds, want)
			}
		}
	}
}

func TestWhatHappensToAConnectionDecidesWhetherItIsAlive(t *testing.T) {
	const ms = time.Millisecond
	a, b := netip.MustParseAddrPort("10.10.0.11:20000"), netip.MustParseAddrPort("10.10.0.11:1024")
	before := func(c *connection) { c.seen(a); c.arrived(9*ms, 8*ms, 0) }
	for _, test := range []struct {
		name string
		kind Kind
		do   func(*connection) // the fault is at 100 ms, the end at 1 s
		want Result
	}{
		{"what arrives at the end is alive", UDP, func(c *connection) {
			before(c)
			c.arrived(105*ms, 95*ms, 100*ms) // sent before the fault: no first byte
			c.arrived(350*ms, 300*ms, 100*ms)
			c.arrived(1005*ms, 1000*ms, 100*ms)
		}, Result{Established: true, Alive: true, First: 250 * ms, Silence: 655 * ms}},
		{"what arrives for a while only is not", TCP, func(c *connection) { before(c); c.arrived(350*ms, 300*ms, 100*ms) },
			Result{Established: true, First: 250 * ms, Silence: 250 * ms}},
		{"what nothing arrives of has no first byte", TCP, before, Result{Established: true}},
		{"what was not established before the fault is not alive", TCP, func(c *connection) { c.arrived(1005*ms, 1000*ms, 100*ms) },
			Result{First: 905 * ms, Silence: 905 * ms}},
		{"QUIC with another port is not alive, though it is answered", QUIC, func(c *connection) { before(c); c.seen(b); c.seen(b); c.arrived(1005*ms, 1000*ms, 100*ms) },
			Result{Established: true, First: 905 * ms, Silence: 905 * ms, Changed: 1}},
		{"echo with another identifier is alive, and counted", ICMP, func(c *connection) { before(c); c.seen(b); c.arrived(1005*ms, 1000*ms, 100*ms) },
			Result{Established: true, Alive: true, First: 905 * ms, Silence: 905 * ms, Changed: 1}},
		{"of several errors the first is shown", TCP, func(c *connection) { before(c); c.failed(io.EOF); c.failed(io.ErrClosedPipe) },
			Result{Established: true, Errors: 2, Error: "EOF"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := &connection{kind: test.kind, port: 20000}
			test.do(c)
			test.want.Kind, test.want.Pod, test.want.Port = test.kind, "p", 20000
			if diff := cmp.Diff(test.want, c.result("p", 1000*ms)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
	c := &connection{}
	if !c.seen(a) || c.seen(b) || !c.seen(a) {
		t.Error("only the source that the connection began with is its own")
	}
}

func TestValidateReportsEveryFault(t *testing.T) {
	err := Config{Lab: lab.Config{Nodes: 3}, Fault: "flood", Pods: 1, Family: 5, Interval: 1, Wait: -1}.Validate()
	for _, want := range []string{`"flood"`, "3 nodes", "1 pods", "family 5", "interval 1ns", "wait -1ns"} {
		if !strings.Contains(fmt.Sprint(err), want) {
			t.Errorf("error %v, want it to say %s", err, want)
		}
	}
	for _, n := range []int{9, 45537} {
		cfg := config()
		cfg.Connections = n
		if err := cfg.Validate(); !strings.Contains(fmt.Sprint(err), fmt.Sprintf("%d connections", n)) {
			t.Errorf("error %v, want it to say %d connections", err, n)
		}
	}
	for _, fault := range Faults {
		cfg := config()
		cfg.Fault = fault
		if err := cfg.Validate(); err != nil {
			t.Errorf("%s: %v", fault, err)
		}
	}
}

func TestFilesHoldEveryConnection(t *testing.T) {
	r := &Report{Fault: "move", Results: []Result{
		{Kind: TCP, Pod: "a/b", Port: 20000, Established: true, Alive: true, First: 1500 * time.Microsecond, Silence: time.Second},
		{Kind: UDP, Pod: "a/c", Port: 20000, Established: true, Changed: 1, Errors: 2, Error: "no, not so"},
	}}
	var csv, svg, table strings.Builder
	if err := errors.Join(r.WriteCSV(&csv), r.WriteSVG(&svg), r.WriteTable(&table)); err != nil {
		t.Fatal(err)
	}
	want := "fault,kind,pod,port,established,alive,first_byte_ms,silence_ms,changed_ports,errors,error\n" +
		"move,tcp,a/b,20000,true,true,1.5,1000.0,0,0,\nmove,udp,a/c,20000,true,false,,,1,2,no; not so\n"
	if csv.String() != want {
		t.Errorf("CSV:\n%swant:\n%s", &csv, want)
	}
	if !strings.Contains(svg.String(), "1 of 2 connections") {
		t.Errorf("the plot does not say how many live:\n%s", &svg)
	}
	for d := xml.NewDecoder(strings.NewReader(svg.String())); ; {
		if _, err := d.Token(); err == io.EOF {
			break
		} else if err != nil {
			t.Fatalf("the plot is no XML: %v\n%s", err, &svg)
		}
	}
	if !strings.Contains(table.String(), "1 times udp: no, not so") {
		t.Errorf("the table does not count the errors:\n%s", &table)
	}
}
