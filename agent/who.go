package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/egret-project/egret/conntrack"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/natlog"
)

const (
	// Socket is the abstract unix socket of the agent, in the network namespace of the node: that there is one agent is
	// known by it, and root asks there.
	Socket = "@egret/agent"
	// ConnectionsPage and LogPage are what is asked there, with the parameters ip, port, from and to
	// (natlog.Question.Query). Both answer with a natlog.Reply.
	ConnectionsPage, LogPage = "/connections", "/natlog"

	// searchTime bounds how long files of the log are read for a question.
	searchTime = 6 * time.Second
	// askShare is how much longer than a question took no other is answered, so that asking takes no processor from a
	// node.
	askShare = 2
)

// answerer answers who has, or had, a port, and what the kernel has for a pod.
type answerer struct {
	node     string
	snapshot func() *egress.Snapshot
	list     func(egress.Mark) ([]conntrack.Flow, error)
	log      *natLogger // nil: off
	kernel   func(context.Context, egress.KernelQuestion) (egress.Kernel, error)
	live     func(context.Context, egress.LiveQuestion) (egress.Live, error)

	following sync.Mutex // held while packets are followed
	followed  time.Time  // when that last ended; guarded by following
	busy      sync.Mutex // held while a question is answered
	until     time.Time  // when the next one may be; guarded by busy
}

// isOther answers, for the agent of own, a question to another node's agent, which the parameter node names: by own
// alone, at no cost. The socket of a node is asked first for all.
func isOther(own string, w http.ResponseWriter, r *http.Request) bool {
	if node := r.URL.Query().Get("node"); node == "" || node == own {
		return false
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(map[string]string{"node": own}) // who asked has gone
	return true
}

// one runs f, unless it is not the time for another question.
func (a *answerer) one(w http.ResponseWriter, f func() (any, error)) {
	if !a.busy.TryLock() {
		http.Error(w, "another question is being answered: ask again", http.StatusServiceUnavailable)
		return
	}
	defer a.busy.Unlock()
	began := time.Now()
	if began.Before(a.until) {
		http.Error(w, "the agent rests after a question that took long: ask again in "+a.until.Sub(began).Round(time.Second).String(), http.StatusServiceUnavailable)
		return
	}
	answer, err := f()
	if took := time.Since(began); took > 100*time.Millisecond {
		a.until = time.Now().Add(askShare * took)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(answer) // who asked has gone
}

// connections is ConnectionsPage: who has the port now, by the kernel.
func (a *answerer) connections(w http.ResponseWriter, r *http.Request) {
	q, err := natlog.ParseQuestion(r.URL.Query())
	if isOther(a.node, w, r) {
		return
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	a.one(w, func() (any, error) {
		answer := natlog.Answer{Uses: []natlog.Line{}}
		s := a.snapshot()
		if s == nil {
			return nil, errors.New("the agent has not read etcd yet")
		}
		names := newNames()
		names.follow(s, time.Now())
		ids := map[egress.ID]bool{}
		index := s.Nodes[a.node].Index
		for _, p := range s.Egresses {
			for _, address := range p.Addresses {
				if address.IP == q.IP || index > 0 && egress.OverlaySource(index, address.ID, address.IP) == q.IP {
					ids[address.ID] = true
				}
			}
		}
		for id := range ids {
			flows, err := a.list(id.ConnMark())
			if err != nil {
				return nil, err
			}
			for _, c := range flows {
				if c.Translated != q.IP || c.Port != q.Port {
					continue
				}
				l := names.of(&c).line(a.node, &c)
				if !q.Chooses(&l) {
					continue
				}
				if answer.More = len(answer.Uses) == natlog.MaxUses; answer.More {
					break
				}
				l.Event, l.Time, l.Start, l.Answered = natlog.Known, time.Now(), c.Start, c.Replied
				if c.Counted {
					l.Traffic = &natlog.Traffic{SentPackets: c.Sent.Packets, SentBytes: c.Sent.Bytes, ReceivedPackets: c.Received.Packets, ReceivedBytes: c.Received.Bytes}
				}
				answer.Uses = append(answer.Uses, l)
			}
		}
		slices.SortFunc(answer.Uses, natlog.Compare)
		return natlog.Reply{Node: a.node, Answer: answer}, nil
	})
}

// natLog is LogPage: who had the port, by the files of the log.
func (a *answerer) natLog(w http.ResponseWriter, r *http.Request) {
	q, err := natlog.ParseQuestion(r.URL.Query())
	switch {
	case isOther(a.node, w, r):
	case err != nil:
		http.Error(w, err.Error(), http.StatusBadRequest)
	case a.log == nil:
		http.Error(w, "the agent of node "+a.node+" logs no connections: it takes --nat-log", http.StatusNotFound)
	case a.log.cfg.File == StandardOutput:
		http.Error(w, "the agent of node "+a.node+" writes its log of connections to its standard output, and cannot read it: give it to egret who --log", http.StatusNotFound)
	default:
		a.one(w, func() (any, error) {
			ctx, cancel := context.WithTimeout(r.Context(), searchTime)
			defer cancel()
			answer, err := natlog.SearchFile(ctx, q, a.log.cfg.File)
			if len(a.log.cfg.Filter) > 0 || a.log.sample() > 0 {
				answer.Missing = append(answer.Missing, fmt.Sprintf("the log has not all connections: filter %q, one in %d", a.log.cfg.Filter, max(a.log.sample(), 1)))
			}
			return natlog.Reply{Node: a.node, Answer: answer}, err
		})
	}
}
