package crdsync

import (
	"errors"
	"net/netip"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/egret-project/egret/api/v1beta1"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/monitor"
)

var passBuckets = []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10}

// The metrics of each replica, and those of the leader about the cluster.
var (
	metricLeader = monitor.Metric{Name: "egret_crdsync_leader", Type: monitor.Gauge,
		Help: "1 for the replica that was elected, 0 for the others. What is said of pools, egresses and nodes, the leader says alone."}
	metricWatch = monitor.Metric{Name: "egret_etcd_watch_up", Type: monitor.Gauge,
		Help: "1 while this replica follows the changes in etcd."}
	metricPass = monitor.Metric{Name: "egret_crdsync_pass_duration_seconds", Type: monitor.Histogram, Buckets: passBuckets,
		Help: "How long a pass of the leader took: it compares what may have changed in the Kubernetes API with etcd, and writes the difference."}
	metricPassFailed = monitor.Metric{Name: "egret_crdsync_passes_failed_total", Type: monitor.Counter,
		Help: "Passes that could not write all; they are tried again. Some fail since the cache was behind, which the next one mends."}
	metricToEtcd = monitor.Metric{Name: "egret_crdsync_event_to_etcd_seconds", Type: monitor.Histogram, Buckets: passBuckets,
		Help: "From when an event of the Kubernetes API came to the leader, as that there is a pod, until etcd had what it asks for; what is compared anew once a minute counts too. With " +
			"egret_change_to_kernel_seconds of the agents it is the way from a pod's event to the kernel."}
	metricStatus = monitor.Metric{Name: "egret_crdsync_status_writes_total", Type: monitor.Counter, Labels: []string{"kind", "result"},
		Help: "Statuses that were looked at to be written, by the kind of object, egress or pool, and the result: ok, also where there was nothing to write; failed, to be tried again."}
	metricReviews = monitor.Metric{Name: "egret_webhook_reviews_total", Type: monitor.Counter, Labels: []string{"verdict"},
		Help: "Objects that the API server asked the webhook of this replica about: allowed, refused, failed (it could not be told, or the question could not be read)."}
	metricNodes = monitor.Metric{Name: "egret_nodes", Type: monitor.Gauge,
		Help: "Nodes of the cluster."}
	metricAgents = monitor.Metric{Name: "egret_agents", Type: monitor.Gauge, Labels: []string{"state"},
		Help: "Nodes of the cluster by their agents: alive; restarting, it was told to stop and a successor is expected; missing, there is none."}
	metricPoolIPs = monitor.Metric{Name: "egret_pool_ips", Type: monitor.Gauge, Labels: []string{"pool"},
		Help: "Addresses of the pool."}
	metricPoolUsed = monitor.Metric{Name: "egret_pool_ips_used", Type: monitor.Gauge, Labels: []string{"pool"},
		Help: "Addresses of the pool that egresses have."}
	metricInfo = monitor.Metric{Name: "egret_egress_info", Type: monitor.Gauge, Labels: []string{"egress", "egress_ip", "pool", "node"},
		Help: "1 for each address of each egress, with its pool (none for a static one) and the node that holds it (none: nobody does)."}
	metricProblem = monitor.Metric{Name: "egret_egress_problem", Type: monitor.Gauge, Labels: []string{"egress", "type", "reason"},
		Help: "1 for each condition of an egress that says that something is wrong with it: `kubectl describe egress` has its message."}
	metricGiven = monitor.Metric{Name: "egret_egress_ports_given", Type: monitor.Gauge, Labels: []string{"egress_ip"},
		Help: "Ports of the egress IP that nodes have, or had and that rest, of 63488 that there are: docs/ports.md."}
)

// Metrics returns all metrics of crdsync, in the order of the documentation.
func Metrics() []monitor.Metric { return append(counted(), read()...) }

// counted are those that a replica counts, read are those that are read when they are asked for.
func counted() []monitor.Metric {
	return []monitor.Metric{metricPass, metricPassFailed, metricToEtcd, metricStatus, metricReviews}
}

func read() []monitor.Metric {
	return []monitor.Metric{metricLeader, metricWatch, metricNodes, metricAgents, metricPoolIPs, metricPoolUsed, metricInfo, metricProblem, metricGiven}
}

// metrics is what a replica counts, and of what its leadership is read. A nil *metrics counts nothing.
type metrics struct {
	counts *monitor.Counts

	mu     sync.Mutex // guards what follows
	status *status    // nil: another replica leads
	given  map[netip.Addr]int
}

func newMetrics() *metrics {
	m := &metrics{counts: monitor.NewCounts(counted())}
	for _, kind := range []string{egressKind, poolKind} {
		m.add(metricStatus, 0, kind, "ok")
		m.add(metricStatus, 0, kind, "failed")
	}
	for _, verdict := range []string{"allowed", "refused", "failed"} {
		m.add(metricReviews, 0, verdict)
	}
	return m
}

func (m *metrics) register(to prometheus.Registerer, reading *monitor.Reading) error {
	return errors.Join(to.Register(m.counts), to.Register(reading))
}

func (m *metrics) add(d monitor.Metric, n int, labels ...string) {
	if m != nil {
		m.counts.Add(d, n, labels...)
	}
}

func (m *metrics) took(d monitor.Metric, long time.Duration) {
	if m != nil {
		m.counts.Took(d, long)
	}
}

// passed notes how a pass went; since is when the first of the events came that it is about; zero: it is about none.
func (m *metrics) passed(began, since time.Time, err error) {
	m.took(metricPass, time.Since(began))
	switch {
	case err != nil:
		m.add(metricPassFailed, 1)
	case !since.IsZero():
		m.took(metricToEtcd, time.Since(since))
	}
}

// leads notes that this replica leads, and what it says of the cluster; nil: it leads no more.
func (m *metrics) leads(s *status) {
	if m == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.status = s
}

// ports notes that n more ports of an IP are given out.
func (m *metrics) ports(ip netip.Addr, n int) {
	if m == nil || n == 0 {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.given[ip] += n; m.given[ip] == 0 {
		delete(m.given, ip)
	}
}

func (m *metrics) noPorts() {
	if m == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.given = map[netip.Addr]int{}
}

// readMetrics puts what is read when it is asked for.
func (r *replica) readMetrics(put func(d monitor.Metric, value float64, labels ...string)) error {
	is := func(d monitor.Metric, yes bool) {
		if yes {
			put(d, 1)
		} else {
			put(d, 0)
		}
	}
	r.metrics.mu.Lock()
	s := r.metrics.status
	if s != nil {
		for ip, n := range r.metrics.given {
			put(metricGiven, float64(n), ip.String())
		}
	}
	r.metrics.mu.Unlock()
	is(metricLeader, s != nil)
	is(metricWatch, r.cache.Healthy())
	if s != nil {
		s.metrics(put)
	}
	return nil
}

// metrics puts what the leader knows of the cluster.
func (s *status) metrics(put func(d monitor.Metric, value float64, labels ...string)) {
	s.mu.Lock()
	verdicts, usage, cluster := s.verdicts, s.usage, s.cluster // replaced, never changed
	s.mu.Unlock()
	if verdicts == nil {
		return // nothing was compared yet
	}
	put(metricNodes, float64(len(cluster.Nodes)))
	agents := map[string]int{"alive": 0, "restarting": 0, "missing": 0}
	for name := range cluster.Nodes {
		switch a, running := cluster.Agents[name]; {
		case !running:
			agents["missing"]++
		case a.Restarting:
			agents["restarting"]++
		default:
			agents["alive"]++
		}
	}
	for state, n := range agents {
		put(metricAgents, float64(n), state)
	}
	for pool, u := range usage {
		put(metricPoolIPs, float64(u.Total), pool)
		put(metricPoolUsed, float64(u.Used), pool)
	}
	now := time.Now()
	for name, v := range verdicts {
		seen := map[egress.Address]bool{}
		for _, a := range v.addresses {
			if !seen[a] {
				put(metricInfo, 1, name, a.IP.String(), a.Pool, cluster.Owners[a.IP].Node)
			}
			seen[a] = true
		}
		for _, c := range egressStatus(v1beta1.EgressStatus{}, v, cluster, now).Conditions {
			good := metav1.ConditionTrue
			if c.Type == v1beta1.Conflict || c.Type == v1beta1.Degraded {
				good = metav1.ConditionFalse
			}
			if c.Status != good {
				put(metricProblem, 1, name, string(c.Type), c.Reason)
			}
		}
	}
}
