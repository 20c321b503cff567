package crdsync

import (
	"cmp"
	"context"
	"fmt"
	"hash/fnv"
	"log/slog"
	"maps"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	eventsclient "k8s.io/client-go/kubernetes/typed/events/v1"

	"github.com/egret-project/egret/api/v1beta1"
	"github.com/egret-project/egret/store"
)

const (
	eventSource = "egret-crdsync" // reportingController, which kubectl shows as From
	// What the API server takes, in bytes:
	// https://github.com/kubernetes/kubernetes/blob/master/pkg/apis/core/validation/events.go
	maxNote, maxInstance = 1024, 128
	// maxNamePart leaves room in an Event's name of 253 bytes for what makes it unique.
	maxNamePart = 220
	// maxUnassigned is how long an IP may be without a node before a Warning: by then a take-over has ended, one of a
	// lease too.
	maxUnassigned = 15 * time.Second
)

// eventRecord is the record told/<kind>/<name> in etcd: what the Events of an object have said. The next Events are
// made of what differs from it, by whichever replica leads then.
type eventRecord struct {
	UID      string            `json:"uid"`
	Changes  int               `json:"changes"`            // how many changes had Events: the Events' names follow from it
	Nodes    map[string]string `json:"nodes,omitempty"`    // IP -> the node that holds it
	Warnings []string          `json:"warnings,omitempty"` // those that have an Event and still apply, sorted
}

// eventText is what one Event says of an object.
type eventText struct{ kind, reason, action, note string }

// changes returns the Events that are due for an object whose record was old: where its IPs went, and the new warnings.
// warnings has the texts of those of a.
func (a eventRecord) changes(old eventRecord, warnings map[string]eventText) []eventText {
	var out []eventText
	for _, ip := range slices.Sorted(maps.Keys(old.Nodes)) {
		if node := old.Nodes[ip]; a.Nodes[ip] != node {
			out = append(out, eventText{corev1.EventTypeNormal, "IPUnassigned", "Unassign", fmt.Sprintf("%s is no longer on node %s", ip, node)})
		}
	}
	for _, ip := range slices.Sorted(maps.Keys(a.Nodes)) {
		if node := a.Nodes[ip]; old.Nodes[ip] != node {
			out = append(out, eventText{corev1.EventTypeNormal, "IPAssigned", "Assign", fmt.Sprintf("%s is on node %s", ip, node)})
		}
	}
	for _, w := range a.Warnings {
		if !slices.Contains(old.Warnings, w) {
			out = append(out, warnings[w])
		}
	}
	return out
}

// eventRecordOf returns what the status of an Egress says, and the texts of its warnings. An IP without a node is a
// warning after maxUnassigned; later is the time until then, 0: never.
func eventRecordOf(s v1beta1.EgressStatus, now time.Time) (a eventRecord, warnings map[string]eventText, later time.Duration) {
	warnings = map[string]eventText{}
	for _, held := range s.Addresses {
		if held.Node != "" {
			if a.Nodes == nil {
				a.Nodes = map[string]string{}
			}
			a.Nodes[held.IP] = held.Node
		}
	}
	allocated := true
	for _, c := range s.Conditions {
		switch {
		case c.Type == v1beta1.IPAllocated && c.Status == metav1.ConditionFalse:
			allocated = false
			// another cause has an Event of its own
			warnings[c.Reason+": "+c.Message] = eventText{corev1.EventTypeWarning, c.Reason, "Allocate", c.Message}
		case c.Type == v1beta1.IPAssigned && c.Status == metav1.ConditionFalse && allocated:
			if later = maxUnassigned - now.Sub(c.LastTransitionTime.Time); later <= 0 {
				warnings[c.Reason] = eventText{corev1.EventTypeWarning, c.Reason, "Assign", c.Message}
			}
		case (c.Type == v1beta1.Conflict || c.Type == v1beta1.Degraded) && c.Status == metav1.ConditionTrue:
			warnings[string(c.Type)+c.Reason] = eventText{corev1.EventTypeWarning, string(c.Type), "Resolve", c.Message}
		}
	}
	a.Warnings = slices.Sorted(maps.Keys(warnings))
	return a, warnings, max(later, 0)
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

// eventRecorder makes Events of what changes, each once, also when the leader changes or dies in between. An
// eventRecord in etcd says what was reported. The Event is created first and the record written then. The Event's name
// follows from the record before it: whoever creates it again, because an answer got lost or a leader was killed, finds
// that it exists. An eventRecorder belongs to one leadership.
type eventRecorder struct {
	client   eventsclient.EventsGetter
	instance string
	store    *store.Client
	lead     *store.Leadership
	log      *slog.Logger

	mu      sync.Mutex // guards what follows; that of one object is for one goroutine
	records map[item]eventRecord
}

// begin reads the records as the leader before left them.
func (d *eventRecorder) begin(ctx context.Context) error {
	records, err := d.store.List(ctx, store.EventRecordPrefix)
	if err != nil {
		return err
	}
	read := map[item]eventRecord{}
	for key, r := range records {
		a, err := store.Decode[eventRecord](r)
		if err != nil {
			d.log.Warn("record is faulty, Events that it had are made again", "err", fmt.Errorf("%s: %w", key, err))
		}
		kind, name, _ := strings.Cut(strings.TrimPrefix(key, store.EventRecordPrefix), "/")
		read[item{kind, name}] = a
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.records = read
	return nil
}

// items returns the objects that have records.
func (d *eventRecorder) items() []item {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Collect(maps.Keys(d.records))
}

// warnings returns the warnings in the record of an object.
func (d *eventRecorder) warnings(it item) []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.records[it].Warnings
}

// record makes the Events of what changed since the record of the object was written. After an error it has to be
// called again.
func (d *eventRecorder) record(ctx context.Context, u *unstructured.Unstructured, it item, now eventRecord, warnings map[string]eventText) error {
	d.mu.Lock()
	old := d.records[it]
	d.mu.Unlock()
	now.UID = string(u.GetUID())
	if old.UID != "" && old.UID != now.UID {
		if err := d.recordDeleted(ctx, it); err != nil {
			return err
		}
		old = eventRecord{}
	}
	about := reference(it, u.GetUID())
	about.ResourceVersion = u.GetResourceVersion()
	return d.write(ctx, it, old, now, about, warnings)
}

// recordRefused makes an Event, one for each spec, of a status that the API server refuses: a field of the spec is not
// of the schema's type, and the status cannot say so.
func (d *eventRecorder) recordRefused(ctx context.Context, u *unstructured.Unstructured, it item, err error) error {
	n := eventText{corev1.EventTypeWarning, "StatusRefused", "Update", "its status cannot be written: " + line(err)}
	return d.create(ctx, d.event(reference(it, u.GetUID()), n, fmt.Sprint("refused ", u.GetGeneration()), 0))
}

func reference(it item, uid types.UID) corev1.ObjectReference {
	return corev1.ObjectReference{APIVersion: v1beta1.GroupVersion.String(), Kind: kinds[it.kind], Name: it.name, UID: uid}
}

// recordDeleted makes the Events of an object that was deleted: it has no IPs any more.
func (d *eventRecorder) recordDeleted(ctx context.Context, it item) error {
	d.mu.Lock()
	old, ok := d.records[it]
	d.mu.Unlock()
	if !ok {
		return nil
	}
	return d.write(ctx, it, old, eventRecord{}, reference(it, types.UID(old.UID)), nil)
}

// write makes the Events and then writes the record; the zero record is deleted.
func (d *eventRecorder) write(ctx context.Context, it item, old, now eventRecord, about corev1.ObjectReference, warnings map[string]eventText) error {
	changes := now.changes(old, warnings)
	for i, n := range changes {
		if err := d.create(ctx, d.event(about, n, fmt.Sprint(old.Changes, i), i)); err != nil {
			return err
		}
	}
	gone := now.UID == ""
	if now.Changes = old.Changes; len(changes) > 0 {
		now.Changes++
	}
	if !gone && old.UID == "" && len(changes) == 0 || reflect.DeepEqual(now, old) { // nothing to be recorded
		return nil
	}
	op := store.Op{Key: store.EventRecordKey(it.kind, it.name)}
	if !gone {
		var err error
		if op.Value, err = store.Encode(now); err != nil {
			return err
		}
	}
	if err := d.lead.Commit(ctx, op); err != nil {
		return fmt.Errorf("recording the Events made: %w", err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if gone {
		delete(d.records, it)
	} else {
		d.records[it] = now
	}
	return nil
}

// event returns an Event. Its name follows from the object, from what it says, and from which change it is.
func (d *eventRecorder) event(about corev1.ObjectReference, n eventText, change string, i int) *eventsv1.Event {
	h := fnv.New64a()
	fmt.Fprintln(h, about.UID, change, n)
	return &eventsv1.Event{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: metav1.NamespaceDefault, // where those of objects without a namespace are
			Name:      fmt.Sprintf("%s.%016x", strings.TrimRight(cut(about.Name, maxNamePart), "-."), h.Sum64()),
		},
		// they sort as they were made
		EventTime:           metav1.NewMicroTime(time.Now().Add(time.Duration(i) * time.Microsecond)),
		ReportingController: eventSource, ReportingInstance: cut(d.instance, maxInstance),
		Type: n.kind, Reason: n.reason, Action: n.action, Note: cut(cmp.Or(n.note, n.reason), maxNote), Regarding: about,
	}
}

// create makes an Event that may be there already. One that is refused is not made.
func (d *eventRecorder) create(ctx context.Context, e *eventsv1.Event) error {
	_, err := d.client.Events(e.Namespace).Create(ctx, e, metav1.CreateOptions{})
	switch {
	case err == nil || apierrors.IsAlreadyExists(err):
	case apierrors.IsInvalid(err) || apierrors.IsForbidden(err) || apierrors.IsNotFound(err):
		d.log.Warn("an Event was refused, it is not made", "err", err)
	default:
		return fmt.Errorf("making an Event: %w", err)
	}
	return nil
}
