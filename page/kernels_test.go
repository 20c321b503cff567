package page

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/operator"
	"github.com/egret-project/egret/store"
)

// traceable is a page that needs no etcd, of a cluster in which node-1 holds the IP of web, and node-2 has its pod
// prod/web-1.
func traceable(agents Agents) *Page {
	ip, pod := netip.MustParseAddr("10.10.0.11"), netip.MustParseAddr("10.244.1.5")
	address := func(last byte) []netip.Addr { return []netip.Addr{netip.AddrFrom4([4]byte{10, 10, 0, last})} }
	block := egress.Block{IP: ip, First: 2048, Size: 1024, Node: "node-2"}
	p := New(nil, agents, nil)
	p.shown = &shown{whole: store.Whole{Everything: store.Everything{Snapshot: egress.Snapshot{
		Pools:    map[string]egress.Pool{"pool": {Name: "pool", Ranges: []egress.Range{{Start: ip, End: ip}}}},
		Egresses: map[string]egress.Policy{"web": {Name: "web", Addresses: []egress.Address{{IP: ip, ID: 1, Pool: "pool"}}}},
		Nodes:    map[string]egress.Node{"node-1": {Name: "node-1", Index: 1, Addresses: address(101)}, "node-2": {Name: "node-2", Index: 2, Addresses: address(102)}},
		Agents:   map[string]egress.Agent{"node-1": {Node: "node-1", Lease: egress.FormatLease(1)}, "node-2": {Node: "node-2", Lease: egress.FormatLease(2)}},
		Owners:   map[netip.Addr]egress.Owner{ip: {IP: ip, Node: "node-1", Lease: 1}},
		ByEgress: map[string]map[string]egress.Members{"web": {"node-2": {
			Egress: "web", Node: "node-2", Pods: []egress.Member{{Pod: "prod/web-1", IPs: []netip.Addr{pod}}}, Blocks: []egress.Block{block},
		}}},
	}}}}
	return p
}

// tells is an agent of each node that tells of its kernel, in which all is well.
func tells(_ context.Context, node string, _ []netip.Addr, _ string, _ url.Values, reply any) error {
	*reply.(*egress.Kernel) = map[string]egress.Kernel{
		"node-1": {Node: "node-1", Watching: true, Permit: 0.4, Answers: true, Guarded: -1},
		"node-2": {Node: "node-2", Watching: true, PodID: 1, Steered: true, Gateway: 1, First: 2048, Ports: 1024, Guarded: -1},
	}[node]
	return nil
}

func TestATraceGoesByKernelsOrSaysWhyNot(t *testing.T) {
	refuses := func(_ context.Context, node string, _ []netip.Addr, _ string, _ url.Values, _ any) error {
		return fmt.Errorf("the agent of node %s: the name in the client's certificate is none of --trace-clients", node)
	}
	for name, tt := range map[string]struct {
		ask                 operator.Ask
		query               string
		verdict, note, step string
	}{
		"agents tell":               {tells, "", "As the kernels of its nodes tell", "", "node-1 has a permit"},
		"agents tell, to somewhere": {tells, "&to=198.51.100.9", "As the kernels of its nodes tell", "for that to 198.51.100.9 ask egret trace", "node-1 has a permit"},
		"agents refuse":             {refuses, "", "As far as etcd tells", "", "node-1 is told by the records alone: the agent of node node-1: the name in the client's certificate"},
		"no agent is asked":         {nil, "&to=198.51.100.9", "As far as etcd tells", "goes by the records in etcd alone: no agent is asked here", "node-1 holds"},
	} {
		h := traceable(Agents{Kernels: operator.Kernels{Ask: tt.ask, Page: "/kernel"}}).Handler()
		r := get(h, "GET", "http://127.0.0.1/trace?pod=prod/web-1"+tt.query, nil)
		var got traced
		if err := json.Unmarshal(r.Body.Bytes(), &got); err != nil || r.Code != 200 {
			t.Errorf("%s: status %d, %s, %v", name, r.Code, r.Body, err)
		}
		if !strings.HasPrefix(got.Verdict, tt.verdict) || !strings.Contains(got.Note, tt.note) || (got.Note == "") != (tt.note == "") || !strings.Contains(fmt.Sprint(got.Steps), tt.step) {
			t.Errorf("%s: %+v; want %q, the note %q and %q", name, got, tt.verdict, tt.note, tt.step)
		}
	}
}

// The records that are shown are half a second old, and kernels have what is so now.
func TestATraceDuringAMoveFindsNoFault(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var p *Page
		moved := false
		p = traceable(Agents{Kernels: operator.Kernels{Page: "/kernel", Ask: func(ctx context.Context, node string, a []netip.Addr, page string, q url.Values, reply any) error {
			if node == "node-1" { // has just handed over to the pod's node
				*reply.(*egress.Kernel) = egress.Kernel{Node: "node-1", Watching: true, Guarded: -1}
				next, ip := traceable(Agents{}).shown, netip.MustParseAddr("10.10.0.11")
				next.whole.Owners[ip] = egress.Owner{IP: ip, Node: "node-2", Lease: 2, Revision: 9}
				time.AfterFunc(minPause/2, func() {
					p.mu.Lock()
					defer p.mu.Unlock()
					p.shown, moved = next, true
				})
				return nil
			}
			*reply.(*egress.Kernel) = egress.Kernel{Node: "node-2", Watching: true, Permit: 0.4, Answers: true, PodID: 1, Steered: true, First: 2048, Ports: 1024, Guarded: -1}
			return nil
		}}})
		r := get(p.Handler(), "GET", "http://127.0.0.1/trace?pod=prod/web-1", nil)
		if want := "As the kernels of its nodes tell it gets through, as 10.10.0.11 by its own node node-2"; !moved || !strings.Contains(r.Body.String(), want) {
			t.Errorf("status %d, %s; want %q", r.Code, r.Body, want)
		}
		time.Sleep(tracePace) // the turns end
	})
}

// An attempt: who may look asks for traces as fast as he can, from many addresses, so that agents do nothing else.
func TestTracesDoNotFloodAgents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var at, most, asked atomic.Int64
		p := traceable(Agents{Kernels: operator.Kernels{Page: "/kernel", Ask: func(ctx context.Context, node string, a []netip.Addr, page string, q url.Values, reply any) error {
			asked.Add(1)
			most.Store(max(most.Load(), at.Add(1)))
			defer at.Add(-1)
			time.Sleep(time.Millisecond)
			return tells(ctx, node, a, page, q, reply)
		}}})
		h := p.Handler()
		var refused atomic.Int64
		var all sync.WaitGroup
		const clients, length = 100, 20 * time.Second
		began := time.Now()
		for i := range clients {
			all.Go(func() {
				for time.Since(began) < length {
					r, w := httptest.NewRequest(http.MethodGet, "http://127.0.0.1/trace?pod=prod/web-1", nil), httptest.NewRecorder()
					r.RemoteAddr = fmt.Sprintf("192.0.2.%d:1", i)
					if h.ServeHTTP(w, r); w.Code != 200 {
						t.Errorf("status %d: %s", w.Code, w.Body)
					}
					if strings.Contains(w.Body.String(), errTracing.Error()) {
						refused.Add(1)
					}
				}
			})
		}
		synctest.Wait()
		if code := asking(t.Context(), p, "192.0.2.1:2", func(*shown) (any, error) { return nil, nil }); code != 200 || time.Since(began) > 0 {
			t.Errorf("another question of one of them: status %d after %v", code, time.Since(began))
		}
		all.Wait()
		if bound := int64(maxTraced * (time.Since(began)/tracePace + 1)); most.Load() > maxTraced || asked.Load() > bound || asked.Load() < bound/2 {
			t.Errorf("%d agents were asked at a time, %d in all; want %d, and %d at most", most.Load(), asked.Load(), maxTraced, bound)
		}
		if refused.Load() == 0 {
			t.Error("nobody was told that others' traces come first")
		}
	})
}

func TestAgentsThatAreSilentKeepATraceForAWhileAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := traceable(Agents{Kernels: operator.Kernels{Page: "/kernel", Ask: func(ctx context.Context, _ string, _ []netip.Addr, _ string, _ url.Values, _ any) error {
			<-ctx.Done()
			return errors.New("no answer")
		}}}).Handler()
		began := time.Now()
		r := get(h, "GET", "http://127.0.0.1/trace?pod=prod/web-1", nil)
		if took := time.Since(began); r.Code != 200 || !strings.Contains(r.Body.String(), "node-2 is told by the records alone: no answer") || took > answerTimeout {
			t.Errorf("status %d after %v: %s", r.Code, took, r.Body)
		}
		synctest.Wait()
		time.Sleep(tracePace) // the turns end
	})
}

// However many agents are silent, who traces the pods of others gets answers.
func TestSilentAgentsHoldUpOneAnotherAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const silent = 10 * maxTraced
		ask := paced(func(ctx context.Context, node string, a []netip.Addr, page string, q url.Values, reply any) error {
			if node == "well" {
				return nil
			}
			<-ctx.Done()
			return ctx.Err()
		})
		trace := func(node string) error {
			ctx, cancel := context.WithTimeout(t.Context(), answerTimeout)
			defer cancel()
			return ask(ctx, node, nil, "/kernel", nil, nil)
		}
		for i := range silent { // nobody knows yet
			_ = trace(fmt.Sprint("silent ", i)) // it says nothing
		}
		var asking sync.WaitGroup
		for i := range silent {
			asking.Go(func() { _ = trace(fmt.Sprint("silent ", i)) })
		}
		synctest.Wait()
		began := time.Now()
		if err := trace("well"); err != nil || time.Since(began) > 0 {
			t.Errorf("another agent: %v after %v, want an answer at once", err, time.Since(began))
		}
		asking.Wait()
		time.Sleep(tracePace) // the turns end
	})
}
