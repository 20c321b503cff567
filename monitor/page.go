package monitor

import (
	"bytes"
	"log/slog"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/expfmt"
)

const (
	// freshFor is for how long metrics are answered with as they were gathered: whoever asks without end costs what one
	// question a second does.
	freshFor = time.Second
	// gatherTimeout is how long a question waits for another one's.
	gatherTimeout = 2 * time.Second
)

// page is /metrics.
type page struct {
	gatherer prometheus.Gatherer
	log      *slog.Logger

	gathering chan struct{} // capacity 1: who has put something in owns what follows
	body      []byte        // never changed, only replaced: it may be on its way to several
	at        time.Time
	said      string // the fault that was logged last
}

func newPage(g prometheus.Gatherer, log *slog.Logger) *page {
	return &page{gatherer: g, log: log, gathering: make(chan struct{}, 1)}
}

// ServeHTTP answers in the text format of Prometheus, uncompressed: on a node, its processor is worth more than the
// bytes.
func (p *page) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	wait := time.NewTimer(gatherTimeout)
	defer wait.Stop()
	select {
	case p.gathering <- struct{}{}:
	case <-wait.C:
		http.Error(w, "metrics are still being gathered for somebody else: ask again", http.StatusServiceUnavailable)
		return
	case <-r.Context().Done():
		return
	}
	body := p.take()
	w.Header().Set("Content-Type", string(expfmt.NewFormat(expfmt.TypeTextPlain)))
	w.Header().Set("Cache-Control", "no-store")
	_, _ = w.Write(body) // who asked has gone
}

// take returns the page, and takes its element out of gathering, also where the Gatherer panics.
func (p *page) take() []byte {
	defer func() { <-p.gathering }()
	if p.body != nil && time.Since(p.at) < freshFor {
		return p.body
	}
	families, err := p.gatherer.Gather() // what could not be had is left out of them
	p.report(err)
	var out bytes.Buffer
	out.Grow(len(p.body) + 4<<10)
	for _, f := range families {
		if _, err := expfmt.MetricFamilyToText(&out, f); err != nil {
			p.report(err)
		}
	}
	p.body, p.at = out.Bytes(), time.Now()
	return p.body
}

// report logs a fault when it comes or changes.
func (p *page) report(err error) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	if text != p.said && text != "" {
		p.log.Warn("metrics are incomplete", "err", err)
	}
	p.said = text
}
