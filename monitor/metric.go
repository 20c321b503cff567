package monitor

import (
	"fmt"
	"strings"

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

// Metric is what a metric is called and means. Its values are made by its methods, so that no metric has another name, other labels, or another
// text than docs/metrics.md says.
type Metric struct {
	Name    string // with the unit, and _total for a counter: https://prometheus.io/docs/practices/naming/
	Type    Type
	Labels  []string
	Buckets []float64 // of a histogram
	Help    string    // one sentence or two, without a line break
}

// Desc describes the metric to Prometheus.
func (m Metric) Desc() *prometheus.Desc { return prometheus.NewDesc(m.Name, m.Help, m.Labels, nil) }

// CounterVec returns a counter for each set of label values.
func (m Metric) CounterVec() *prometheus.CounterVec {
	return prometheus.NewCounterVec(prometheus.CounterOpts{Name: m.Name, Help: m.Help}, m.Labels)
}

// HistogramVec returns a histogram for each set of label values.
func (m Metric) HistogramVec() *prometheus.HistogramVec {
	return prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: m.Name, Help: m.Help, Buckets: m.Buckets}, m.Labels)
}

// Reading is a set of metrics that are read when they are asked for.
type Reading struct {
	descs map[string]*prometheus.Desc
	types map[string]prometheus.ValueType
	read  func(put func(m Metric, value float64, labels ...string)) error
}

// NewReading returns what reads the metrics by read, which puts each value that there is. An error of it, a panic too, leaves out what was not put, and
// makes the page say that it is incomplete.
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
