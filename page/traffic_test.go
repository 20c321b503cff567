package page

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/egret-project/egret/egress"
)

// agents are those of a test: each sends 1,000 bytes a second by one IP, and answers after a while.
type agents struct {
	booted time.Time
	began  time.Time // when it got the IP
	after  time.Duration
	fault  error

	mu               sync.Mutex // guards what follows
	asked            map[string]int
	atOnce, mostOnce int
}

var testIP = netip.MustParseAddr("10.0.0.1")

func (a *agents) ask(ctx context.Context, node string, _ []netip.Addr) (out egress.NodeTraffic, err error) {
	a.mu.Lock()
	if a.asked == nil {
		a.asked = map[string]int{}
	}
	a.asked[node]++
	a.atOnce++
	a.mostOnce = max(a.mostOnce, a.atOnce)
	a.mu.Unlock()
	defer func() { a.mu.Lock(); a.atOnce--; a.mu.Unlock() }()
	n := uint64(1000 * time.Since(a.began).Seconds())
	out = egress.NodeTraffic{Node: node, Read: time.Since(a.booted), IPs: map[netip.Addr]egress.Traffic{testIP: {SentPackets: n / 100, SentBytes: n, ReceivedBytes: 2 * n}}}
	select { // the answer is on its way
	case <-time.After(a.after):
		return out, a.fault
	case <-ctx.Done():
		return out, ctx.Err()
	}
}

func (a *agents) row(g *gateways, node string) trafficRow {
	last, before, err := g.read(context.Background(), node, nil)
	return rowOf(testIP, node, last, before, err)
}

func TestTrafficIsARateByTwoAnswersOfTheGateway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &agents{booted: time.Now().Add(-time.Hour), began: time.Now()}
		g := newGateways(a.ask)
		time.Sleep(10 * time.Second)
		if r := a.row(g, "n"); r.Rated || r.SentBytes != 10_000 || r.Fault != "" {
			t.Errorf("by the first answer: %+v", r)
		}
		time.Sleep(trafficEvery)
		if r := a.row(g, "n"); !r.Rated || r.SentRate != 8000 || r.ReceivedRate != 16000 || r.SentBytes != 14_000 {
			t.Errorf("by two: %+v", r)
		}
		time.Sleep(trafficEvery)
		a.began = time.Now() // the IP went and came back: the kernel counts anew
		if r := a.row(g, "n"); r.Rated || r.SentBytes != 0 || r.Fault != "" {
			t.Errorf("counted anew: %+v", r)
		}
		time.Sleep(trafficEvery)
		if r := a.row(g, "other"); r.Rated {
			t.Errorf("another node, which has it from now on: %+v", r)
		}
		time.Sleep(trafficEvery)
		a.booted = time.Now().Add(-time.Second) // within the page's patience
		if r := a.row(g, "n"); r.Rated || r.Fault != "" {
			t.Errorf("a node that has booted: %+v", r)
		}
		if r := rowOf(netip.MustParseAddr("10.0.0.2"), "n", g.of["n"].last, g.of["n"].before, nil); r.Rated || r.Fault == "" {
			t.Errorf("an IP of which the gateway tells nothing: %+v", r)
		}
		time.Sleep(trafficKept + time.Second)
		if a.row(g, "other"); len(g.of) != 1 {
			t.Errorf("%d nodes are remembered, of which somebody wants to know of one", len(g.of))
		}
	})
}

// What takes long is the way there and back, another time each time, and an agent that gives an answer again that it
// gave somebody else.
func TestARateIsRightHoweverLongAnswersTake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &agents{booted: time.Now().Add(-time.Hour), began: time.Now()}
		g := newGateways(a.ask)
		for i := range 20 {
			time.Sleep(trafficEvery)
			a.after = time.Duration(i%5) * 700 * time.Millisecond
			if r := a.row(g, "n"); r.Fault != "" || i > 0 && (!r.Rated || math.Round(r.SentRate) != 8000 || math.Round(r.ReceivedRate) != 16000) {
				t.Errorf("%d, after %v: %+v; want 8000 and 16000 bit/s", i, a.after, r)
			}
		}
		ask := g.ask
		old, err := ask(t.Context(), "n", nil)
		if err != nil {
			t.Fatal(err)
		}
		g.ask = func(context.Context, string, []netip.Addr) (egress.NodeTraffic, error) { return old, nil }
		for range 3 {
			time.Sleep(trafficEvery)
			if r := a.row(g, "n"); !r.Rated || math.Round(r.SentRate) != 8000 {
				t.Errorf("an answer that came before: %+v", r)
			}
		}
		time.Sleep(trafficEvery)
		old.Read = 0
		for range 3 {
			if r := a.row(g, "n"); r.Rated || r.Fault != "" {
				t.Errorf("an agent that tells no time: %+v", r)
			}
			time.Sleep(trafficEvery)
		}
		// What an agent says of its clock is shown, if anything, as a number.
		for _, read := range []time.Duration{math.MinInt64, -1, 1, math.MaxInt64} {
			old.Read = read
			old.IPs = map[netip.Addr]egress.Traffic{testIP: {SentBytes: math.MaxUint64}}
			if _, err := json.Marshal(a.row(g, "n")); err != nil {
				t.Errorf("read at %v: %v", read, err)
			}
			time.Sleep(trafficEvery)
		}
	})
}

func TestAGatewayIsAskedOnceWhoeverLooks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &agents{booted: time.Now().Add(-time.Hour), began: time.Now(), after: 500 * time.Millisecond}
		g := newGateways(a.ask)
		for range 4 { // within trafficEvery of the answer
			var looking sync.WaitGroup
			for range maxViewers {
				looking.Go(func() {
					if r := a.row(g, "n"); r.Fault != "" {
						t.Errorf("%+v", r)
					}
				})
			}
			looking.Wait()
			time.Sleep(time.Second)
		}
		if a.asked["n"] != 1 {
			t.Errorf("asked %v", a.asked)
		}
		var looking sync.WaitGroup
		for i := range 5 * maxAsked {
			looking.Go(func() { a.row(g, fmt.Sprint(i)) })
		}
		looking.Wait()
		if a.mostOnce > maxAsked {
			t.Errorf("%d agents were asked at a time: want %d at most", a.mostOnce, maxAsked)
		}
		a.after = 0
		began := time.Now()
		for i := range 5 * maxAsked {
			looking.Go(func() { a.row(g, fmt.Sprint("quick ", i)) })
		}
		looking.Wait()
		if took := time.Since(began); took < 4*trafficPace {
			t.Errorf("%d agents that answer at once were asked within %v: want %v at least", 5*maxAsked, took, 4*trafficPace)
		}
		time.Sleep(trafficPace) // a test ends when nothing is left
	})
}

func TestAnAgentThatDoesNotAnswerIsLeftAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &agents{booted: time.Now().Add(-time.Hour), began: time.Now(), after: time.Hour}
		g := newGateways(a.ask)
		began := time.Now()
		if r := a.row(g, "n"); !strings.Contains(r.Fault, "deadline") || time.Since(began) > trafficPatience {
			t.Errorf("after %v: %+v", time.Since(began), r)
		}
		began = time.Now()
		if r := a.row(g, "n"); r.Fault == "" || time.Since(began) > 0 || a.asked["n"] != 1 {
			t.Errorf("at once: %+v, asked %v", r, a.asked)
		}
		time.Sleep(trafficRest)
		a.after = 0
		if r := a.row(g, "n"); r.Fault != "" || r.Rated {
			t.Errorf("when it answers again: %+v", r)
		}
		// Who asks goes; who waits for the same answer gets it.
		time.Sleep(trafficEvery)
		a.after = time.Second
		ctx, cancel := context.WithCancel(context.Background())
		var asking sync.WaitGroup
		asking.Go(func() { _, _, _ = g.read(ctx, "n", nil) })
		synctest.Wait()
		cancel()
		if r := a.row(g, "n"); r.Fault != "" || !r.Rated {
			t.Errorf("beside one who has gone: %+v", r)
		}
		asking.Wait()
		time.Sleep(trafficEvery)
		a.fault = errors.New("the agent of node n: no")
		if r := a.row(g, "n"); r.Fault != "the agent of node n: no; it is asked again within 20s" || r.SentBytes != 0 {
			t.Errorf("a refusal: %+v", r)
		}
	})
}

// However many agents are silent, the rows of others are there.
func TestAgentsThatAreSilentHoldUpOneAnotherAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &agents{booted: time.Now().Add(-time.Hour), began: time.Now(), after: time.Hour}
		well := &agents{booted: a.booted, began: a.began}
		g := newGateways(func(ctx context.Context, node string, addresses []netip.Addr) (egress.NodeTraffic, error) {
			if node == "well" {
				return well.ask(ctx, node, addresses)
			}
			return a.ask(ctx, node, addresses)
		})
		var looking sync.WaitGroup
		look := func() {
			for i := range 5 * maxAsked {
				looking.Go(func() { a.row(g, fmt.Sprint("silent ", i)) })
			}
		}
		look() // nobody knows yet
		looking.Wait()
		time.Sleep(trafficRest)
		look()
		synctest.Wait()
		began := time.Now()
		if r := well.row(g, "well"); r.Fault != "" || time.Since(began) > 0 {
			t.Errorf("another agent after %v: %+v, want an answer at once", time.Since(began), r)
		}
		looking.Wait()
		time.Sleep(trafficPace) // a test ends when nothing is left
	})
}

// Who asks does not wait for ever, and is told in words whom it waited for.
func TestARowSaysWhyNothingIsKnownYet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &agents{booted: time.Now().Add(-time.Hour), began: time.Now(), after: 2500 * time.Millisecond}
		g := newGateways(a.ask)
		short := func(node string) trafficRow {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			last, before, err := g.read(ctx, node, nil)
			return rowOf(testIP, node, last, before, err)
		}
		var asking sync.WaitGroup
		for i := range maxAsked {
			asking.Go(func() { a.row(g, fmt.Sprint("slow ", i)) })
		}
		synctest.Wait()
		if r := short("slow 0"); r.Fault != "the agent of node slow 0 is being asked, and has not answered yet" {
			t.Errorf("beside another one who asks: %+v", r)
		}
		if r := short("n"); !strings.HasPrefix(r.Fault, "the agent of node n was not asked yet") {
			t.Errorf("beside as many as are asked at a time: %+v", r)
		}
		asking.Wait()
		time.Sleep(trafficPace)
		a.after = 0
		if r := short("n"); r.Fault != "" || r.SentBytes == 0 {
			t.Errorf("when others are done: %+v", r)
		}
		time.Sleep(trafficPace) // a test ends when nothing is left
	})
}

func TestAnAgentThatTellsTooMuchIsNotHeard(t *testing.T) {
	many := map[netip.Addr]egress.Traffic{}
	for ip := testIP; len(many) <= egress.MaxTraffic; ip = ip.Next() {
		many[ip] = egress.Traffic{}
	}
	g := newGateways(func(context.Context, string, []netip.Addr) (egress.NodeTraffic, error) {
		return egress.NodeTraffic{IPs: many}, nil
	})
	if last, _, err := g.read(t.Context(), "n", nil); err == nil || len(last.IPs) > 0 {
		t.Errorf("%d IPs, %v", len(last.IPs), err)
	}
}

func TestTrafficIsAskedForWhatIsOnTheScreen(t *testing.T) {
	c := newCluster(t, 30, 50)
	h := c.page().Handler()
	if r := get(h, "GET", "/state", nil); r.Code != http.StatusOK || !strings.Contains(r.Body.String(), `"traffic":true`) || c.asked.Load() != 0 {
		t.Errorf("the state: %d, %d agents were asked", r.Code, c.asked.Load())
	}
	r := get(h, "GET", fmt.Sprintf("/traffic?ips=%s,%s,%s,192.0.2.1", egressIP(0), egressIP(1), egressIP(16)), nil)
	var rows map[netip.Addr]trafficRow
	if err := json.Unmarshal(r.Body.Bytes(), &rows); err != nil || r.Code != http.StatusOK || len(rows) != 4 {
		t.Fatalf("%d %s: %v", r.Code, r.Body, err)
	}
	if c.asked.Load() != 2 || rows[egressIP(0)].SentBytes == 0 || rows[egressIP(1)].Gateway != nodeName(1) || rows[egressIP(16)].Fault == "" || rows[netip.MustParseAddr("192.0.2.1")].Fault == "" {
		t.Errorf("%d agents were asked: %+v", c.asked.Load(), rows)
	}
	for _, bad := range []string{"", "x", "10.0.0.1,", "fe80::1%25eth0", strings.Repeat("10.0.0.1,", 300) + "10.0.0.1", strings.Repeat("9", 20_000)} {
		if r := get(h, "GET", "/traffic?ips="+bad, nil); r.Code != http.StatusBadRequest {
			t.Errorf("%.40q: %d %s", bad, r.Code, r.Body)
		}
	}
	without := New(c.client, Agents{}, nil).Handler()
	if r := get(without, "GET", "/traffic?ips=10.0.0.1", nil); r.Code != http.StatusNotFound {
		t.Errorf("where no agent is asked: %d %s", r.Code, r.Body)
	}
}
