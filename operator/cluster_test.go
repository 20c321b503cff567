package operator

import (
	"context"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

func TestAClusterHasTheWorstOfEachThing(t *testing.T) {
	w := whole()
	agent(w, "node-1", func(a *egress.Agent) {
		a.Faults = map[string]string{"routes": "no route"}
		a.Conflicts = map[netip.Addr]string{ip: "02:00:00:00:00:01"}
	})
	delete(w.Agents, "node-2")
	w.Agents["gone"] = egress.Agent{Node: "gone", Version: "v1"}
	c := NewCluster(w, nil, store.Space{NoSpace: true})
	web := c.Egresses[0]
	if web.Level != Broken || web.Why != "node-1: "+ip.String()+": 02:00:00:00:00:01" || web.Pods != 1 || web.Addresses[0].Gateway != "node-1" || web.Addresses[0].Ports != 1024 {
		t.Errorf("the egress is %+v", web)
	}
	levels := map[string]Level{}
	for _, n := range c.Nodes {
		levels[n.Name+" "+n.Agent] = n.Level
	}
	if diff := cmp.Diff(map[string]Level{"gone v1": Degraded, "node-1 v1": Broken, "node-2 down": Degraded}, levels); diff != "" {
		t.Errorf("nodes (-want +got):\n%s", diff)
	}
	if first := c.Troubles[0]; first.Level != Broken || c.Troubles[1].What != "etcd" {
		t.Errorf("troubles are %v, want what is broken first, and that etcd is full", c.Troubles)
	}
	if p := c.Pools[0]; p.Used != 1 || p.Total != 2 || p.Nodes != 2 {
		t.Errorf("the pool is %+v", p)
	}
}

func TestTheTimeLineIsOfAllIPsTheNewestFirstAndNamesCrashes(t *testing.T) {
	at := func(minute int) time.Time { return time.Date(2026, 1, 1, 0, minute, 0, 0, time.UTC) }
	other := ip.Next()
	tenures := []egress.Tenure{ // in the order in which etcd took them
		{IP: ip, Node: "a", Since: at(1), Why: egress.ReasonClaim},
		{IP: other, Node: "a", Since: at(3), Why: egress.ReasonClaim}, // by a clock that is fast
		{IP: ip, Node: "b", Since: at(2), Why: egress.ReasonClaim},
	}
	got := timeline(tenures, 2)
	want := []egress.Tenure{
		{IP: ip, Node: "b", From: "a", Since: at(2), Why: egress.ReasonCrash},
		{IP: other, Node: "a", Since: at(3), Why: egress.ReasonClaim},
	}
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if tenures[2].Why != egress.ReasonClaim {
		t.Error("the tenures that were given were changed")
	}
}

func TestFindTellsWhatIsExactlySoFirst(t *testing.T) {
	w := whole()
	six := netip.MustParseAddr("fd44::5") // no egress has the pod by this one
	pods := w.Unselected["node-2"]
	pods.Pods = append(slices.Clone(pods.Pods), egress.Member{Pod: "prod/web-1", IPs: []netip.Addr{six}})
	w.Unselected["node-2"] = pods
	for text, want := range map[string][]Hit{
		"web":             {{"egress", "web", ip.String()}, {"pod", "prod/web-1", "of egress web on node-2"}},
		"WEB-1":           {{"pod", "prod/web-1", "of egress web on node-2"}},
		six.String():      {{"pod", "prod/web-1", "of no egress, on node-2"}},
		podIP.String():    {{"pod", "prod/web-1", "of egress web on node-2"}},
		"db-1":            {{"pod", "prod/db-1", "of no egress, on node-2"}},
		"10.10.0.102":     {{"node", "node-2", "10.10.0.102"}},
		" ":               nil,
		"nowhere":         nil,
		ip.String() + " ": {{"ip", ip.String(), "of egress web"}},
	} {
		if diff := cmp.Diff(want, Find(w, text, 5)); diff != "" {
			t.Errorf("%q (-want +got):\n%s", text, diff)
		}
	}
}

// An attempt: who may look at the status page traces to addresses, to find out which of them answer on a node's links,
// and to which of them pods have connections.
func TestATraceForOthersAsksKernelsForNoDestination(t *testing.T) {
	kernels := map[string]egress.Kernel{
		"node-1": {Node: "node-1", Watching: true, Permit: 0.4, Answers: true, Guarded: -1},
		"node-2": {Node: "node-2", Watching: true, PodID: 1, Steered: true, Gateway: 1, First: 2048, Ports: 1024, Guarded: -1},
	}
	var mu sync.Mutex // guards asked
	asked := map[string]string{}
	ask := func(_ context.Context, node string, _ []netip.Addr, page string, q url.Values, reply any) error {
		mu.Lock()
		defer mu.Unlock()
		asked[node] = page + "?" + q.Encode()
		*reply.(*egress.Kernel) = kernels[node]
		return nil
	}
	q := Question{Pod: "prod/web-1", To: netip.MustParseAddr("198.51.100.9"), Protocol: "tcp", Port: 443}
	way, err := TraceIn(t.Context(), whole(), q, Kernels{Ask: ask, Page: "/kernel"})
	if err != nil || way.Status != 0 || !strings.HasPrefix(way.Verdict, "As the kernels of its nodes tell it gets through") {
		t.Errorf("%+v, %v", way, err)
	}
	want := map[string]string{"node-1": "/kernel?id=1&ip=10.10.0.11&peer=2", "node-2": "/kernel?id=1&ip=10.10.0.11&peer=1&pod=10.244.1.5"}
	if diff := cmp.Diff(want, asked); diff != "" {
		t.Errorf("agents were asked (-want +got):\n%s", diff)
	}
	if way, err := TraceIn(t.Context(), whole(), q, Kernels{}); err != nil || !strings.HasPrefix(way.Verdict, "As far as etcd tells") {
		t.Errorf("without agents: %+v, %v", way, err)
	}
}
