package ownership

import (
	"time"

	"github.com/egret-project/egret/plan"
)

// sight is how much of etcd's owners the machine has to see. A bystander (plan.Cluster.Bystander), which holds no lock
// and can get none, decides nothing about locks, and its view need not have those of all egress IPs. The view says of
// itself whether it does (egress.Snapshot.Partial): by one that does not the machine claims, revokes and moves nothing.
type sight struct {
	whole    bool      // a view with all owners was seen
	restores int       // of the etcd that it was of
	active   time.Time // when this node last was no bystander, or sent what may bring it a lock
}

// look says what the view has to have. It is asked in each round, after roles.
//
// What a node sent while it was no bystander, a claim or word that it is ready for a move, may arrive later, also from
// a former process. So it goes on to see all until nothing can be on its way any more. That it holds nothing only a
// view of all owners can show, of this etcd.
func (m *Machine) look(now time.Time) Watch {
	p, s := &m.round, &m.sight
	if s.active.IsZero() {
		s.active = m.cfg.Start
	}
	if !p.cluster.Partial {
		s.whole, s.restores = true, p.cluster.Restores
	}
	if !m.bystands() {
		s.active = now
		return Watch{All: true}
	}
	if !s.whole || s.restores != p.cluster.Restores {
		return Watch{All: true}
	}
	if due := s.active.Add(m.cfg.Late); now.Before(due) {
		p.next = earlier(p.next, due)
		return Watch{All: true}
	}
	return Watch{}
}

// bystands reports whether this node has nothing to do with any lock.
func (m *Machine) bystands() bool {
	for _, role := range m.round.roles {
		if role != plan.None {
			return false
		}
	}
	if len(m.tenures.linger)+len(m.tenures.locks) > 0 || !m.round.cluster.Bystander(m.round.facts) {
		return false
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.permits.list)+len(m.permits.gone)+len(m.permits.silent) == 0
}

// forget leaves out what is known by views of all owners: the next one begins anew.
func (m *Machine) forget() {
	m.claims = claims{shorter: m.claims.shorter}
	m.peers.since, m.peers.doubts = map[string]time.Time{}, map[string]doubt{}
}
