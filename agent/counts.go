package agent

import (
	"errors"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/monitor"
)

// metrics is what an agent counts. A nil *metrics counts nothing.
type metrics struct {
	counts *monitor.Counts

	mu       sync.Mutex // guards what follows
	owned    []netip.Addr
	degraded []string

	// What follows belongs to the goroutine of loop.
	takeovers
	wrote bool      // to the kernel, in this reconcile
	since time.Time // when the oldest change came that the kernel does not have yet
}

func newMetrics() *metrics {
	m := &metrics{counts: monitor.NewCounts(counted()), takeovers: newTakeovers()}
	for _, how := range []string{"frames", "commit", "failed"} {
		m.add(metricRenewals, 0, how)
	}
	for _, part := range []string{"addresses", "routes", "nftables"} {
		m.add(metricKernel, 0, part)
	}
	// Prometheus sees no increase in a series that begins with 1: no alert would fire for the first.
	for _, why := range []egress.Reason{egress.ReasonClaim, egress.ReasonCrash, egress.ReasonRelease} {
		m.counts.Begin(metricTakeover, string(why))
	}
	return m
}

// register makes all metrics of the agent known. An error: another one has them there.
func (m *metrics) register(to prometheus.Registerer, reading *monitor.Reading) error {
	return errors.Join(to.Register(m.counts), to.Register(reading))
}

// add counts n more.
func (m *metrics) add(d monitor.Metric, n int, labels ...string) {
	if m != nil {
		m.counts.Add(d, n, labels...)
	}
}

// took notes that something took so long.
func (m *metrics) took(d monitor.Metric, long time.Duration, labels ...string) {
	if m != nil {
		m.counts.Took(d, long, labels...)
	}
}

// programmed notes what the kernel has after a reconcile: all that was wanted, or not.
func (m *metrics) programmed(whole bool, now time.Time) {
	if m == nil {
		return
	}
	if whole {
		for ip, o := range m.taken {
			if begun := m.begun[ip]; !begun.IsZero() {
				why, _ := m.cause(o)
				m.took(metricTakeover, now.Sub(begun), why)
			}
			delete(m.begun, ip)
			delete(m.last, ip)
		}
		clear(m.taken)
		if m.wrote && !m.since.IsZero() {
			m.took(metricToKernel, now.Sub(m.since))
		}
		m.since = time.Time{}
	}
	m.wrote = false
}

// changes counts n changes that are about to be, or were, written to a part of the kernel.
func (m *metrics) changes(part string, n int) {
	if m != nil && n > 0 {
		m.add(metricKernel, n, part)
		m.wrote = true
	}
}

// renewed notes how permits that would have lasted for left were renewed.
func (m *metrics) renewed(left time.Duration, err, slow error) {
	how := "frames"
	if err != nil {
		how = "failed"
	} else if slow != nil {
		how = "commit"
	}
	m.add(metricRenewals, 1, how)
	m.took(metricMargin, max(left, 0))
}

// came notes since when there are changes that the kernel does not have yet; the zero Time: there are no others.
func (m *metrics) came(since time.Time) {
	if m != nil {
		m.since = earlier(m.since, since)
	}
}

// reconciled notes how a reconcile went: what faults says of its error, and which IPs are in use after it.
func (m *metrics) reconciled(long time.Duration, err error, parts map[string]string, owned []netip.Addr) {
	if m == nil {
		return
	}
	m.took(metricPass, long)
	var degraded []string
	if err != nil {
		m.add(metricPassFailed, 1)
		if degraded = slices.Sorted(maps.Keys(parts)); len(degraded) == 0 {
			degraded = []string{"other"}
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.degraded, m.owned = degraded, owned
}
