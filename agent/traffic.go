package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/nft"
)

// TrafficPage is where the agent is asked what has passed by the egress IPs that its node holds. It answers with an
// egress.NodeTraffic, and tells nothing that /metrics does not.
const TrafficPage = "/traffic"

// trafficAge is for how long an answer is given again, as that of /metrics is: a question costs the node nothing more
// often than that.
const trafficAge = time.Second

// trafficAnswerer is TrafficPage.
type trafficAnswerer struct {
	node string
	read func() (map[netip.Addr]nft.Traffic, error)
	now  func() (time.Duration, error) // the time that NodeTraffic.Read is of

	mu   sync.Mutex // guards what follows, and has those who ask at once wait for one reading
	text []byte
	at   time.Time
	err  error
}

// ServeHTTP answers. A question to another node's agent is answered by the name of this one alone, as answerer's are.
func (t *trafficAnswerer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if isOther(t.node, w, r) {
		return
	}
	text, err := t.answer()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(text) // who asked has gone
}

func (t *trafficAnswerer) answer() ([]byte, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.at.IsZero() && time.Since(t.at) < trafficAge {
		return t.text, t.err
	}
	now, err1 := t.now()
	counted, err2 := t.read()
	err := errors.Join(err1, err2)
	if err == nil {
		answer := egress.NodeTraffic{Node: t.node, Read: now, IPs: make(map[netip.Addr]egress.Traffic, len(counted))}
		for ip, n := range counted {
			if len(answer.IPs) < egress.MaxTraffic {
				answer.IPs[ip] = egress.Traffic(n)
			}
		}
		t.text, err = json.Marshal(answer)
	}
	t.err, t.at = err, time.Now()
	return t.text, err
}

// sinceBoot returns how long ago the node booted.
func sinceBoot() (time.Duration, error) {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
		return 0, fmt.Errorf("reading the time since the node booted: %w", err)
	}
	return time.Duration(t.Nano()), nil
}
