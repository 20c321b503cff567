package crdsync

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

// actAge is how old an act may be that a new leader finds: the Event of an older one may have gone by itself, after an
// hour by default, and would be made again.
const actAge = 30 * time.Minute

// actEvents makes Events of acts, what people did with egret commands: of the node, or of the egresses that have the
// IP. The name of an Event follows from its act, so the next leader, which finds the act too, makes no second one.
type actEvents struct {
	cache    *store.Cache
	recorder *eventRecorder
	uids     func(ip netip.Addr) (of map[string]types.UID, known bool) // of the egresses that have an IP, by name
	created  map[string]bool                                           // by key
	listed   bool
}

func newActEvents(c *store.Client, s *status) *actEvents {
	return &actEvents{cache: c.NewCache(store.ActPrefix), recorder: s.recorder, uids: s.having, created: map[string]bool{}}
}

// run makes Events of acts until ctx ends.
func (a *actEvents) run(ctx context.Context) error {
	for wait := minBackoff; ; {
		select {
		case <-a.cache.Changed():
		case <-ctx.Done():
			return ctx.Err()
		}
		for a.createNew(ctx, time.Now()) != nil { // the API server does not answer
			select {
			case <-time.After(wait):
				wait = min(2*wait, maxBackoff)
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		wait = minBackoff
	}
}

// createNew makes the Events of the acts that have none yet. After an error it has to be called again.
func (a *actEvents) createNew(ctx context.Context, now time.Time) error {
	there := map[string]bool{}
	for key, r := range a.cache.List(store.ActPrefix) {
		if there[key] = true; a.created[key] {
			continue
		}
		act, err := store.Decode[egress.Act](r)
		if err == nil && (a.listed || now.Sub(act.Since) < actAge) {
			if err := a.create(ctx, key, act); err != nil {
				return err
			}
		}
		a.created[key] = true // what cannot be read is the reader's to report: egret get acts
	}
	for key := range a.created {
		if !there[key] {
			delete(a.created, key)
		}
	}
	a.listed = true
	return nil
}

func (a *actEvents) create(ctx context.Context, key string, act egress.Act) error {
	n, ok := actTexts[act.What]
	if !ok {
		return nil // a newer version's
	}
	var about []corev1.ObjectReference
	if act.IP.IsValid() {
		n.note = fmt.Sprintf(n.note, act.IP, act.Node, act.By)
		uids, known := a.uids(act.IP)
		if !known {
			return errors.New("this leader has not compared anything yet")
		}
		for name, uid := range uids {
			about = append(about, reference(item{egressKind, name}, uid))
		}
		slices.SortFunc(about, func(x, y corev1.ObjectReference) int { return strings.Compare(x.Name, y.Name) })
	} else {
		n.note = fmt.Sprintf(n.note, act.Node, act.By)
		// kubectl looks for Events of a Node by its name in place of the UID, as kubelets make them.
		about = append(about, corev1.ObjectReference{APIVersion: "v1", Kind: "Node", Name: act.Node, UID: types.UID(act.Node)})
	}
	for i, of := range about {
		if err := a.recorder.create(ctx, a.recorder.event(of, n, key, i)); err != nil {
			return err
		}
	}
	return nil
}

// actTexts are the Events of what people do: of IP, node and person, or of node and person.
var actTexts = map[egress.Deed]eventText{
	egress.ActMove:     {corev1.EventTypeNormal, "MoveRequested", "Move", "%s: a move to node %s was asked for by %s"},
	egress.ActPin:      {corev1.EventTypeNormal, "IPPinned", "Pin", "%s: pinned to node %s by %s"},
	egress.ActUnpin:    {corev1.EventTypeNormal, "IPUnpinned", "Unpin", "%s: unpinned%.0s by %s"},
	egress.ActCordon:   {corev1.EventTypeNormal, "EgretCordoned", "Cordon", "node %s takes no egress IPs and gives its own away: cordoned by %s"},
	egress.ActUncordon: {corev1.EventTypeNormal, "EgretUncordoned", "Uncordon", "node %s takes egress IPs again: uncordoned by %s"},
	egress.ActDrain:    {corev1.EventTypeNormal, "EgretDrained", "Drain", "node %s takes no egress IPs and gives its own away: drained by %s"},
}

// having returns the egresses that have an IP, with their UIDs; it is not known before the first pass.
func (s *status) having(ip netip.Addr) (of map[string]types.UID, known bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	of = map[string]types.UID{}
	for name, v := range s.published.verdicts {
		if slices.ContainsFunc(v.addresses, func(a egress.Address) bool { return a.IP == ip }) {
			of[name] = v.uid
		}
	}
	return of, s.published.verdicts != nil
}
