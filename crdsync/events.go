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
	// What the API server takes, in bytes: https://github.com/kubernetes/kubernetes/blob/master/pkg/apis/core/validation/events.go
	maxNote, maxInstance = 1024, 128
	// maxNamePart leaves room in an Event's name of 253 bytes for what makes it unique.
	maxNamePart = 220
	// patience is how long an IP may be without a node before a person is told: take-overs are over by then, those of leases too.
	patience = 15 * time.Second
)

// account is told/<kind>/<name>: what was told of an object. The next change is told by its difference from that, whoever leads then.
type account struct {
	UID      string            `json:"uid"`
	Changes  int               `json:"changes"`            // how many were told: the names of their Events follow from it
	Nodes    map[string]string `json:"nodes,omitempty"`    // IP -> the node that holds it
	Warnings []string          `json:"warnings,omitempty"` // what a person was told to mend and has not, sorted
}

// news is one thing to be said of an object.
type news struct{ kind, reason, action, note string }

// since returns what is to be told when an object's account was old: where its IPs went, and what a person must mend from now on.
// warnings has the words for those of a.
func (a account) since(old account, warnings map[string]news) []news {
	var out []news
	for _, ip := range slices.Sorted(maps.Keys(old.Nodes)) {
		if node := old.Nodes[ip]; a.Nodes[ip] != node {
			out = append(out, news{corev1.EventTypeNormal, "IPUnassigned", "Unassign", fmt.Sprintf("%s is no longer on node %s", ip, node)})
		}
	}
	for _, ip := range slices.Sorted(maps.Keys(a.Nodes)) {
		if node := a.Nodes[ip]; old.Nodes[ip] != node {
			out = append(out, news{corev1.EventTypeNormal, "IPAssigned", "Assign", fmt.Sprintf("%s is on node %s", ip, node)})
		}
	}
	for _, w := range a.Warnings {
		if !slices.Contains(old.Warnings, w) {
			out = append(out, warnings[w])
		}
	}
	return out
}

// accountOf returns what the status of an Egress says, and the words for its warnings. An IP without a node is one after patience;
// later is when it becomes one, 0: never.
func accountOf(s v1beta1.EgressStatus, now time.Time) (a account, warnings map[string]news, later time.Duration) {
	warnings = map[string]news{}
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
			warnings[c.Reason+": "+c.Message] = news{corev1.EventTypeWarning, c.Reason, "Allocate", c.Message} // another cause is news
		case c.Type == v1beta1.IPAssigned && c.Status == metav1.ConditionFalse && allocated:
			if later = patience - now.Sub(c.LastTransitionTime.Time); later <= 0 {
				warnings[c.Reason] = news{corev1.EventTypeWarning, c.Reason, "Assign", c.Message}
			}
		case (c.Type == v1beta1.Conflict || c.Type == v1beta1.Degraded) && c.Status == metav1.ConditionTrue:
			warnings[string(c.Type)+c.Reason] = news{corev1.EventTypeWarning, string(c.Type), "Resolve", c.Message}
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

// diary sees to it that every change is told once, whoever leads and whatever dies on the way. An account in etcd says what was told.
// An Event is made first and the account is written then; it is named by the account that it follows, so that whoever makes it again,
// because an answer got lost or a leader was killed in between, makes none. It belongs to one leadership.
type diary struct {
	client   eventsclient.EventsGetter
	instance string
	store    *store.Client
	lead     *store.Leadership
	log      *slog.Logger

	mu       sync.Mutex // guards what follows; that of one object is for one goroutine
	accounts map[item]account
}

// begin reads the accounts as the leader before left them.
func (d *diary) begin(ctx context.Context) error {
	records, err := d.store.List(ctx, store.EventRecordPrefix)
	if err != nil {
		return err
	}
	accounts := map[item]account{}
	for key, r := range records {
		a, err := store.Decode[account](r)
		if err != nil {
			d.log.Warn("record is faulty, what it says was told is told again", "err", fmt.Errorf("%s: %w", key, err))
		}
		kind, name, _ := strings.Cut(strings.TrimPrefix(key, store.EventRecordPrefix), "/")
		accounts[item{kind, name}] = a
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.accounts = accounts
	return nil
}

// items returns the objects that something was told of.
func (d *diary) items() []item {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Collect(maps.Keys(d.accounts))
}

// warned returns what was told of an object that a person has to mend.
func (d *diary) warned(it item) []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.accounts[it].Warnings
}

// tell makes the Events of what changed since the last time. With an error, it has to be called again.
func (d *diary) tell(ctx context.Context, u *unstructured.Unstructured, it item, now account, warnings map[string]news) error {
	d.mu.Lock()
	old := d.accounts[it]
	d.mu.Unlock()
	now.UID = string(u.GetUID())
	if old.UID != "" && old.UID != now.UID {
		if err := d.close(ctx, it); err != nil {
			return err
		}
		old = account{}
	}
	about := reference(it, u.GetUID())
	about.ResourceVersion = u.GetResourceVersion()
	return d.write(ctx, it, old, now, about, warnings)
}

// refused tells, once for each spec, that the status of an object cannot say what is wrong: the API server does not take it, as a field of
// the spec is not even of the schema's type.
func (d *diary) refused(ctx context.Context, u *unstructured.Unstructured, it item, err error) error {
	n := news{corev1.EventTypeWarning, "StatusRefused", "Update", "its status cannot be written: " + line(err)}
	return d.make(ctx, d.event(reference(it, u.GetUID()), n, fmt.Sprint("refused ", u.GetGeneration()), 0))
}

func reference(it item, uid types.UID) corev1.ObjectReference {
	return corev1.ObjectReference{APIVersion: v1beta1.GroupVersion.String(), Kind: kinds[it.kind], Name: it.name, UID: uid}
}

// close tells that an object which is gone holds nothing any more.
func (d *diary) close(ctx context.Context, it item) error {
	d.mu.Lock()
	old, ok := d.accounts[it]
	d.mu.Unlock()
	if !ok {
		return nil
	}
	return d.write(ctx, it, old, account{}, reference(it, types.UID(old.UID)), nil)
}

// write makes the Events and then writes the account; the zero account is deleted.
func (d *diary) write(ctx context.Context, it item, old, now account, about corev1.ObjectReference, warnings map[string]news) error {
	said := now.since(old, warnings)
	for i, n := range said {
		if err := d.make(ctx, d.event(about, n, fmt.Sprint(old.Changes, i), i)); err != nil {
			return err
		}
	}
	gone := now.UID == ""
	if now.Changes = old.Changes; len(said) > 0 {
		now.Changes++
	}
	if !gone && old.UID == "" && len(said) == 0 || reflect.DeepEqual(now, old) { // nothing to be remembered
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
		return fmt.Errorf("remembering what was told: %w", err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if gone {
		delete(d.accounts, it)
	} else {
		d.accounts[it] = now
	}
	return nil
}

// event returns an Event. Its name follows from the object, from what it says, and from which change it is.
func (d *diary) event(about corev1.ObjectReference, n news, change string, i int) *eventsv1.Event {
	h := fnv.New64a()
	fmt.Fprintln(h, about.UID, change, n)
	return &eventsv1.Event{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: metav1.NamespaceDefault, // where those of objects without a namespace are
			Name:      fmt.Sprintf("%s.%016x", strings.TrimRight(cut(about.Name, maxNamePart), "-."), h.Sum64()),
		},
		EventTime:           metav1.NewMicroTime(time.Now().Add(time.Duration(i) * time.Microsecond)), // what is said first comes first
		ReportingController: eventSource, ReportingInstance: cut(d.instance, maxInstance),
		Type: n.kind, Reason: n.reason, Action: n.action, Note: cut(cmp.Or(n.note, n.reason), maxNote), Regarding: about,
	}
}

// make makes an Event that may be there already. One that is refused is not made.
func (d *diary) make(ctx context.Context, e *eventsv1.Event) error {
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
