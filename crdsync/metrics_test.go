package crdsync

import (
	"fmt"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/expfmt"

	"github.com/egret-project/egret/api/v1beta1"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/monitor"
	"github.com/egret-project/egret/store"
)

// leading returns a replica that leads, of a cluster with so many egresses and nodes.
func leading(egresses, nodes int) *replica {
	s := &status{verdicts: map[string]verdict{}, usage: map[string]v1beta1.IPPoolUsage{"pool": {Total: 2000, Used: int64(egresses)}}}
	s.cluster = clusterState{load: map[string]int{}, Snapshot: egress.Snapshot{
		Owners: map[netip.Addr]egress.Owner{}, Agents: map[string]egress.Agent{}, Pools: map[string]egress.Pool{"pool": {Name: "pool"}}, Nodes: map[string]egress.Node{},
	}}
	for i := range nodes {
		name := fmt.Sprint("node-", i)
		s.cluster.Nodes[name] = egress.Node{Name: name}
		s.cluster.Agents[name] = egress.Agent{Node: name}
	}
	m := newMetrics()
	m.noPorts()
	for i := range egresses {
		ip := netip.AddrFrom4([4]byte{10, 1, byte(i / 250), byte(i%250 + 1)})
		name := fmt.Sprint("egress-", i)
		s.verdicts[name] = verdict{name: name, addresses: []egress.Address{{IP: ip, ID: egress.ID(i + 1), Pool: "pool"}}}
		s.cluster.Owners[ip] = egress.Owner{IP: ip, Node: fmt.Sprint("node-", i%nodes)}
		m.ports(ip, 1024*10)
	}
	m.leads(s)
	return &replica{metrics: m, cache: new(store.Client).NewCache(store.OwnerPrefix)} // it follows nothing
}

func page(t testing.TB, r *replica) string {
	t.Helper()
	registry := prometheus.NewRegistry()
	if err := r.metrics.register(registry, monitor.NewReading(read(), r.readMetrics)); err != nil {
		t.Fatal(err)
	}
	return gather(t, registry)
}

func gather(t testing.TB, from prometheus.Gatherer) string {
	t.Helper()
	families, err := from.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	for _, f := range families {
		if _, err := expfmt.MetricFamilyToText(&out, f); err != nil {
			t.Fatal(err)
		}
	}
	return out.String()
}

func TestMetricsTellOfTheClusterWhileLeading(t *testing.T) {
	r := leading(3, 2)
	s := r.metrics.status
	// One has no owner, one no address, and one agent is gone, another one restarts.
	delete(s.cluster.Owners, netip.MustParseAddr("10.1.0.2"))
	v := s.verdicts["egress-2"]
	v.addresses, v.err = nil, fmt.Errorf("pool x does not exist")
	s.verdicts["egress-2"] = v
	delete(s.cluster.Agents, "node-0")
	s.cluster.Agents["node-1"] = egress.Agent{Node: "node-1", Restarting: true}
	r.metrics.ports(netip.MustParseAddr("10.1.0.3"), -10240)
	r.metrics.passed(time.Now(), time.Now(), nil)
	r.metrics.passed(time.Now(), time.Now(), store.ErrConflict)
	got := page(t, r)
	for _, want := range []string{
		"egret_crdsync_leader 1\n", "egret_nodes 2\n", `egret_agents{state="missing"} 1`, `egret_agents{state="restarting"} 1`, `egret_agents{state="alive"} 0`,
		`egret_pool_ips{pool="pool"} 2000`, `egret_pool_ips_used{pool="pool"} 3`,
		`egret_egress_info{egress="egress-0",egress_ip="10.1.0.1",node="node-0",pool="pool"} 1`,
		`egret_egress_info{egress="egress-1",egress_ip="10.1.0.2",node="",pool="pool"} 1`,
		`egret_egress_problem{egress="egress-1",reason="AssignmentError",type="IPAssigned"} 1`,
		`egret_egress_problem{egress="egress-2",reason="AllocationError",type="IPAllocated"} 1`,
		`egret_egress_ports_given{egress_ip="10.1.0.1"} 10240`, "egret_crdsync_passes_failed_total 1\n", "egret_crdsync_event_to_etcd_seconds_count 1\n",
		"egret_crdsync_pass_duration_seconds_count 2\n", `egret_webhook_reviews_total{verdict="refused"} 0`,
	} {
		if !strings.Contains(got, want) {
			t.Errorf("the metrics do not say that %s", want)
		}
	}
	for _, not := range []string{`egret_egress_problem{egress="egress-0"`, `egret_egress_ports_given{egress_ip="10.1.0.3"}`} {
		if strings.Contains(got, not) {
			t.Errorf("the metrics say that %s", not)
		}
	}
	// Who does not lead knows nothing of the cluster: what it knew is old.
	r.metrics.leads(nil)
	r.metrics.counts = monitor.NewCounts(nil)
	if got := page(t, r); strings.Contains(got, "egret_egress") || strings.Contains(got, "egret_pool") || !strings.Contains(got, "egret_crdsync_leader 0\n") {
		t.Errorf("a replica that does not lead tells:\n%s", got)
	}
}

// scrape1000 returns a scrape of the leader with 1,000 egresses and 200 nodes.
func scrape1000(t testing.TB) (scrape func() (bytes int)) {
	t.Helper()
	r := leading(1000, 200)
	registry := prometheus.NewRegistry()
	if err := r.metrics.register(registry, monitor.NewReading(read(), r.readMetrics)); err != nil {
		t.Fatal(err)
	}
	return func() int { return len(gather(t, registry)) }
}

func BenchmarkScrapeOf1000Egresses(b *testing.B) {
	scrape := scrape1000(b)
	before, size := cpu(b), 0
	for b.Loop() {
		size = scrape()
	}
	b.ReportMetric(float64((cpu(b)-before).Microseconds())/1000/float64(b.N), "ms-cpu/scrape")
	b.ReportMetric(float64(size), "bytes/scrape")
}

// As of the agent: it is the time on a processor that counts, and the least of several scrapes.
func TestAScrapeOf1000EgressesCostsLessThan50Milliseconds(t *testing.T) {
	const limit, patience = 50 * time.Millisecond, 90 * time.Second
	scrape := scrape1000(t)
	least := time.Hour
	for end := time.Now().Add(patience); least > limit*raceFactor && time.Now().Before(end); {
		before := cpu(t)
		if size := scrape(); size < 140_000 {
			t.Fatalf("%d bytes: that is not all of it", size)
		}
		least = min(least, cpu(t)-before)
	}
	t.Logf("%v of a processor", least)
	if least > limit*raceFactor {
		t.Errorf("it takes %v of a processor, want %v at most", least, limit*raceFactor)
	}
}

func cpu(b testing.TB) time.Duration {
	b.Helper()
	var r syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err != nil {
		b.Fatal(err)
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}
