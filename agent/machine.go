package agent

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/ownership"
	"github.com/egret-project/egret/plan"
	"github.com/egret-project/egret/store"
)

// machine is the node's ownership.Machine, with the lease that its locks are under.
type machine struct {
	*ownership.Machine

	mu    sync.Mutex // guards lease, and that it is the Machine's
	lease *store.Lease
}

func newMachine(cfg ownership.Config) *machine {
	cfg.Process, cfg.Start = rand.Uint64(), time.Now()
	return &machine{Machine: ownership.New(cfg)}
}

func (m *machine) step(e ownership.Event) []ownership.Effect { return m.Step(time.Now(), e) }

// grant makes a lease the one that the machine's locks are under.
func (m *machine) grant(l *store.Lease) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.lease = l
	m.step(ownership.Granted{Lease: l.ID(), Sent: l.Valid().Add(-l.TTL()), TTL: l.TTL()})
}

// begin begins a pass, with the lease of all of it.
func (m *machine) begin(c *plan.Cluster) (lease *store.Lease, now time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	now = time.Now()
	m.Step(now, ownership.View{Cluster: c}) // asks for nothing but what a pass begins with
	return m.lease, now
}

func (m *machine) current() *store.Lease {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.lease
}

// answers reports whether the permit to answer for ip is alive, lasts whether that to send with it is.
func (m *machine) answers(ip netip.Addr) bool {
	_, answer := m.Lasts(time.Now(), ip)
	return answer
}

func (m *machine) lasts(ip netip.Addr) bool {
	send, _ := m.Lasts(time.Now(), ip)
	return send
}

// keeps reports whether the lock of ip goes on when this agent stops.
func (m *machine) keeps(ip netip.Addr) bool { return m.Keeps(time.Now(), ip) }

// tell gives the machine an event from outside of a pass, and does what it asks for.
func (a *agent) tell(e ownership.Event) (err error) {
	for _, effect := range a.machine.step(e) {
		switch f := effect.(type) {
		case ownership.Withdraw:
			err = errors.Join(err, a.permits.withdraw(nil))
		case ownership.Renew:
			a.permits.soon()
		case ownership.Wake:
			a.wake()
		case ownership.Say:
			if b, err := json.Marshal(f.Message); err == nil { // it cannot fail
				a.gossip.Send(f.To, b)
			}
		}
	}
	return err
}

// heard takes in a peer's word.
func (a *agent) heard(from string, b []byte) {
	var m ownership.Message
	if json.Unmarshal(b, &m) == nil { // else it is of a version to come
		_ = a.tell(ownership.Heard{From: from, Message: m}) // withdraws nothing
	}
}

// question asks the peers for promises while etcd is missing, until ctx ends.
func (a *agent) question(ctx context.Context) error {
	tick := time.NewTicker(a.Permit / 10)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			if time.Since(a.machine.Lease().Confirmed) < a.Permit/4 {
				continue // etcd answers: nobody has to be asked
			}
			if s := a.view.Snapshot(); s != nil {
				_ = a.tell(ownership.Question{Peers: a.peers(s)}) // withdraws nothing
			}
		}
	}
}

// peers returns the other agents that could claim: those that etcd knows, and those that joined while it does not answer.
func (a *agent) peers(s *egress.Snapshot) []string {
	all := map[string]bool{}
	for name := range s.Agents {
		all[name] = true
	}
	for _, name := range a.gossip.Alive() {
		all[name] = true
	}
	delete(all, a.Node)
	return slices.Sorted(maps.Keys(all))
}
