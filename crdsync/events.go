package crdsync

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"

	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	eventsclient "k8s.io/client-go/kubernetes/typed/events/v1"

	"github.com/egret-project/egret/api/v1beta1"
)

const (
	eventSource = "egret-crdsync" // reportingController, which kubectl shows as From
	// What the API server takes, in bytes: https://github.com/kubernetes/kubernetes/blob/master/pkg/apis/core/validation/events.go
	maxNote, maxInstance = 1024, 128
	// maxNamePart leaves room in an Event's name of 253 bytes for what makes it unique.
	maxNamePart = 220
)

// news is one thing to be said of an egress.
type news struct{ kind, reason, action, note string }

// newsOf returns what an egress's change of status is to be told as: where its IP went, and what a person must mend from now on.
func newsOf(old, now v1beta1.EgressStatus) []news {
	var out []news
	if old.EgressIP != now.EgressIP || old.EgressNode != now.EgressNode {
		if old.EgressNode != "" {
			out = append(out, news{corev1.EventTypeNormal, "IPUnassigned", "Unassign", fmt.Sprintf("%s is no longer on node %s", old.EgressIP, old.EgressNode)})
		}
		if now.EgressNode != "" {
			out = append(out, news{corev1.EventTypeNormal, "IPAssigned", "Assign", fmt.Sprintf("%s is on node %s", now.EgressIP, now.EgressNode)})
		}
	}
	for _, c := range now.Conditions {
		same := func(o v1beta1.EgressCondition) bool {
			return o.Type == c.Type && o.Status == c.Status && o.Reason == c.Reason
		}
		if slices.ContainsFunc(old.Conditions, same) {
			continue
		}
		switch {
		case c.Type == v1beta1.IPAllocated && c.Status == metav1.ConditionFalse:
			out = append(out, news{corev1.EventTypeWarning, c.Reason, "Allocate", c.Message})
		case (c.Type == v1beta1.Conflict || c.Type == v1beta1.Degraded) && c.Status == metav1.ConditionTrue:
			out = append(out, news{corev1.EventTypeWarning, string(c.Type), "Resolve", c.Message})
		}
	}
	return out
}

// eventsOf returns the Events of an Egress whose status went from that of one version to that of another. Their names follow from the
// later version: whoever makes them again makes none.
func eventsOf(from, to *unstructured.Unstructured, instance string) []*eventsv1.Event {
	var out []*eventsv1.Event
	for i, n := range newsOf(readStatus(from), readStatus(to)) {
		out = append(out, &eventsv1.Event{
			ObjectMeta: metav1.ObjectMeta{
				Namespace: metav1.NamespaceDefault, // where those of objects without a namespace are
				Name:      fmt.Sprintf("%s.%s.%d", strings.TrimRight(cut(to.GetName(), maxNamePart), "-."), to.GetResourceVersion(), i),
			},
			EventTime: metav1.NowMicro(), ReportingController: eventSource, ReportingInstance: cut(instance, maxInstance),
			Type: n.kind, Reason: n.reason, Action: n.action, Note: cut(n.note, maxNote),
			Regarding: corev1.ObjectReference{
				APIVersion: to.GetAPIVersion(), Kind: to.GetKind(), Name: to.GetName(), UID: to.GetUID(), ResourceVersion: to.GetResourceVersion(),
			},
		})
	}
	return out
}

// readStatus returns the status of an Egress; the zero status when it cannot be read.
func readStatus(u *unstructured.Unstructured) (out v1beta1.EgressStatus) {
	raw, _, _ := unstructured.NestedMap(u.Object, "status")
	if runtime.DefaultUnstructuredConverter.FromUnstructured(raw, &out) != nil {
		return v1beta1.EgressStatus{}
	}
	return out
}

// cut returns the first n bytes of a text, without the part of a character.
func cut(text string, n int) string {
	if len(text) > n {
		text = strings.ToValidUTF8(text[:n], "")
	}
	return text
}

// diary sees to it that every change of a status is told once: when the API server says that it took the status, or, where its answer
// got lost, when the object shows it. What could not be told yet is kept. It belongs to one leadership; what a leader that is killed
// has written and not told stays untold.
type diary struct {
	client   eventsclient.EventsGetter
	instance string
	log      *slog.Logger

	mu       sync.Mutex                   // guards what follows
	attempts map[string]attempt           // the last write of each egress's status that was not refused
	untold   map[string][]*eventsv1.Event // by egress, in their order
}

// attempt is a write of an egress's status.
type attempt struct {
	from     *unstructured.Unstructured // the object as it was before
	answered bool                       // it was taken, and its events are in the diary
}

func (d *diary) begin() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.attempts, d.untold = map[string]attempt{}, map[string][]*eventsv1.Event{}
}

// wrote notes what the API server said when the status of an object was written: the object as it is now, or an error.
func (d *diary) wrote(from, to *unstructured.Unstructured, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case err == nil:
		d.attempts[from.GetName()] = attempt{from, true}
		d.addLocked(from, to)
	case apierrors.IsConflict(err) || refused(err): // an earlier try, the answer to which got lost, may be why
	default:
		d.attempts[from.GetName()] = attempt{from, false}
	}
}

// refused reports whether an error says that the API server did not do what it was asked, and never will.
func refused(err error) bool {
	return apierrors.IsInvalid(err) || apierrors.IsForbidden(err) || apierrors.IsNotFound(err)
}

// current reports whether an object can be written: it is not the one that was written already. Where it is not known what became of
// the last write, a newer object says so: nobody else writes statuses.
func (d *diary) current(u *unstructured.Unstructured) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	a, ok := d.attempts[u.GetName()]
	if ok && a.from.GetUID() == u.GetUID() && a.from.GetResourceVersion() == u.GetResourceVersion() {
		return !a.answered
	}
	if ok && a.from.GetUID() == u.GetUID() && !a.answered {
		d.addLocked(a.from, u)
	}
	delete(d.attempts, u.GetName())
	return true
}

// forget is for an egress that is gone. Its events are told all the same.
func (d *diary) forget(name string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.attempts, name)
}

func (d *diary) addLocked(from, to *unstructured.Unstructured) {
	if events := eventsOf(from, to, d.instance); len(events) > 0 {
		d.untold[to.GetName()] = append(d.untold[to.GetName()], events...)
	}
}

// tell makes the Events of an egress that are not made yet. It is for one goroutine per egress.
func (d *diary) tell(ctx context.Context, name string) error {
	for {
		d.mu.Lock()
		events := d.untold[name]
		if len(events) == 0 {
			delete(d.untold, name)
			d.mu.Unlock()
			return nil
		}
		d.mu.Unlock()
		_, err := d.client.Events(events[0].Namespace).Create(ctx, events[0], metav1.CreateOptions{})
		switch {
		case err == nil || apierrors.IsAlreadyExists(err): // an answer got lost
		case refused(err):
			d.log.Warn("an Event was refused, it is not made", "egress", name, "err", err)
		default:
			return fmt.Errorf("making an Event: %w", err)
		}
		d.mu.Lock()
		d.untold[name] = events[1:]
		d.mu.Unlock()
	}
}
