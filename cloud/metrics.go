package cloud

import (
	"errors"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/egret-project/egret/monitor"
)

// What a replica tells of itself, and its leader of the addresses.
var (
	metricLeader = monitor.Metric{Name: "egret_cloud_leader", Type: monitor.Gauge,
		Help: "1 for the replica that was elected, 0 for the others. What is said of addresses, the leader says alone."}
	metricAddresses = monitor.Metric{Name: "egret_cloud_addresses", Type: monitor.Gauge, Labels: []string{"state"},
		Help: "Egress IPs that have an owner: assigned to its network interface; waiting for that; failed, " +
			"which is tried again: the log says why."}
	metricMoved = monitor.Metric{Name: "egret_cloud_assign_seconds", Type: monitor.Histogram,
		Buckets: []float64{.05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60},
		Help: "From when an egress IP was seen to have another owner until the cloud said that " +
			"it is assigned to the owner's network interface."}
	metricCalls = monitor.Metric{Name: "egret_cloud_calls_total", Type: monitor.Counter, Labels: []string{"call", "result"},
		Help: "Calls of the cloud's API: read, assign or unassign, and the result: ok, refused, " +
			"throttled, unknown (no answer, or one that says nothing)."}
)

// Metrics returns all that the controller tells, in the order of the documentation.
func Metrics() []monitor.Metric {
	return []monitor.Metric{metricLeader, metricAddresses, metricMoved, metricCalls}
}

// metrics is what a replica counts.
type metrics struct {
	counts *monitor.Counts

	mu        sync.Mutex // guards what follows
	leader    bool
	addresses map[string]int
}

func newMetrics() *metrics {
	return &metrics{counts: monitor.NewCounts([]monitor.Metric{metricMoved, metricCalls})}
}

func (m *metrics) register(to prometheus.Registerer) error {
	reading := monitor.NewReading([]monitor.Metric{metricLeader, metricAddresses}, m.read)
	return errors.Join(to.Register(m.counts), to.Register(reading))
}

func (m *metrics) read(put func(d monitor.Metric, value float64, labels ...string)) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.leader {
		put(metricLeader, 0)
		return nil
	}
	put(metricLeader, 1)
	for state, n := range m.addresses {
		put(metricAddresses, float64(n), state)
	}
	return nil
}

func (m *metrics) leads(yes bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.leader, m.addresses = yes, nil
}

// states takes over how many addresses are how.
func (m *metrics) states(count map[string]int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.addresses = count
}

func (m *metrics) moved(long time.Duration) { m.counts.Took(metricMoved, long) }

func (m *metrics) called(call string, err error) {
	result := "unknown"
	switch {
	case err == nil:
		result = "ok"
	case errors.Is(err, ErrRefused):
		result = "refused"
	case errors.Is(err, ErrThrottled):
		result = "throttled"
	}
	m.counts.Add(metricCalls, 1, call, result)
}
