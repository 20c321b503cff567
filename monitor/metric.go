package monitor

import (
	"fmt"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Type is that of a Metric, as Prometheus names it.
type Type string

// The types.
const (
	Counter   Type = "counter"
	Gauge     Type = "gauge"
	Histogram Type = "histogram"
)

// Metric is what a metric is called and means. Its values are made by its methods, so that no metric has another name,
// other labels, or another text than docs/metrics.md says.
type Metric struct {
	Name    string // with the unit, and _total for a counter: https://prometheus.io/docs/practices/naming/
	Type    Type
	Labels  []string
	Buckets []float64 // of a histogram
	Help    string    // one sentence or two, without a line break
}

// Desc describes the metric to Prometheus.
func (m Metric) Desc() *prometheus.Desc { return prometheus.NewDesc(m.Name, m.Help, m.Labels, nil) }

// Counts is a set of counters and histograms that a daemon counts. Its methods are safe for concurrent use.
type Counts struct {
	counters   map[string]*prometheus.CounterVec
	histograms map[string]*prometheus.HistogramVec
}

// NewCounts returns what counts the metrics, which are counters or histograms. Those without labels are there from the
// beginning, as 0.
func NewCounts(list []Metric) *Counts {
	c := &Counts{map[string]*prometheus.CounterVec{}, map[string]*prometheus.HistogramVec{}}
	for _, m := range list {
		if m.Type == Counter {
			c.counters[m.Name] = prometheus.NewCounterVec(prometheus.CounterOpts{Name: m.Name, Help: m.Help}, m.Labels)
		} else {
			c.histograms[m.Name] = prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: m.Name, Help: m.Help, Buckets: m.Buckets}, m.Labels)
		}
		if len(m.Labels) == 0 {
			c.Begin(m)
		}
	}
	return c
}

// Begin makes a metric with these labels be there, as 0, before anything is counted: what begins with 1 did not
// increase, for Prometheus.
func (c *Counts) Begin(m Metric, labels ...string) {
	if m.Type == Counter {
		c.Add(m, 0, labels...)
	} else {
		c.histograms[m.Name].WithLabelValues(labels...)
	}
}

// Add counts n more.
func (c *Counts) Add(m Metric, n int, labels ...string) {
	c.counters[m.Name].WithLabelValues(labels...).Add(float64(n))
}

// Took notes that something took so long.
func (c *Counts) Took(m Metric, long time.Duration, labels ...string) {
	c.histograms[m.Name].WithLabelValues(labels...).Observe(long.Seconds())
}

func (c *Counts) all(f func(prometheus.Collector)) {
	for _, v := range c.counters {
		f(v)
	}
	for _, v := range c.histograms {
		f(v)
	}
}

// Describe describes all.
func (c *Counts) Describe(out chan<- *prometheus.Desc) {
	c.all(func(v prometheus.Collector) { v.Describe(out) })
}

// Collect sends what was counted.
func (c *Counts) Collect(out chan<- prometheus.Metric) {
	c.all(func(v prometheus.Collector) { v.Collect(out) })
}

// Reading is a set of metrics that are read when they are asked for.
type Reading struct {
	descs map[string]*prometheus.Desc
	types map[string]prometheus.ValueType
	read  func(put func(m Metric, value float64, labels ...string)) error
}

// NewReading returns what reads the metrics by read, which puts each value that there is. An error of it, a panic too,
// leaves out what was not put, and makes the page say that it is incomplete.
func NewReading(list []Metric, read func(put func(m Metric, value float64, labels ...string)) error) *Reading {
	r := &Reading{descs: map[string]*prometheus.Desc{}, types: map[string]prometheus.ValueType{}, read: read}
	for _, m := range list {
		r.descs[m.Name], r.types[m.Name] = m.Desc(), prometheus.GaugeValue
		if m.Type == Counter {
			r.types[m.Name] = prometheus.CounterValue
		}
	}
	return r
}

// Describe says nothing: what there is depends on what is read.
func (r *Reading) Describe(chan<- *prometheus.Desc) {}

// Collect reads.
func (r *Reading) Collect(out chan<- prometheus.Metric) {
	err := func() (err error) {
		defer func() {
			if p := recover(); p != nil { // a question must not end the daemon
				err = fmt.Errorf("reading metrics panicked: %v", p)
			}
		}()
		return r.read(func(m Metric, value float64, labels ...string) {
			v, err := prometheus.NewConstMetric(r.descs[m.Name], r.types[m.Name], value, labels...)
			if err != nil {
				v = prometheus.NewInvalidMetric(m.Desc(), err)
			}
			out <- v
		})
	}()
	if err != nil {
		out <- prometheus.NewInvalidMetric(prometheus.NewInvalidDesc(err), err)
	}
}

// Document returns a table of metrics in Markdown.
func Document(list []Metric) string {
	var b strings.Builder
	b.WriteString("| metric | type | labels | meaning |\n| --- | --- | --- | --- |\n")
	for _, m := range list {
		labels := "-"
		if len(m.Labels) > 0 {
			labels = "`" + strings.Join(m.Labels, "`, `") + "`"
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", m.Name, m.Type, labels, m.Help)
	}
	return b.String()
}
