package crdsync

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/validate/content"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/tools/cache"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

// nodeTimeout bounds a question about one node.
const nodeTimeout = 10 * time.Second

// startup takes a taint off nodes whose agent is ready. Kubelets register new nodes with it, so that no pod is there
// before its node knows whose egress IP it has. It is never put on: a node whose agent dies later serves on, and where
// it does not, NoSchedule helps no pod that is there.
type startup struct {
	taint  string // its key; the effect may be any
	nodes  cache.SharedIndexInformer
	agents *store.Cache
	client corev1client.NodesGetter
	wake   chan struct{} // capacity 1: a node came, or changed
	log    *slog.Logger
}

// validTaint refuses what is no key of a taint, and those of Kubernetes itself, which say other things than Egret
// knows. What the cluster autoscaler takes for a start-up taint begins with a name of Kubernetes' all the same.
func validTaint(key string) error {
	if key == "" || strings.HasPrefix(key, "startup-taint.cluster-autoscaler.kubernetes.io/") && len(content.IsLabelKey(key)) == 0 {
		return nil
	}
	prefix, _, _ := strings.Cut(key, "/")
	if len(content.IsLabelKey(key)) > 0 || prefix == key || slices.Contains(taintsOfLeaving, key) {
		return fmt.Errorf("--startup-taint %q: want the key of a taint of your own, like egret/agent-not-ready", key)
	}
	if prefix == "kubernetes.io" || strings.HasSuffix(prefix, ".kubernetes.io") {
		return fmt.Errorf("--startup-taint %q: want a key of your own, like egret/agent-not-ready: Kubernetes' taints are not Egret's to take off", key)
	}
	return nil
}

func newStartup(taint string, src *source, agents *store.Cache, client corev1client.NodesGetter, log *slog.Logger) (*startup, error) {
	s := &startup{taint: taint, nodes: src.nodes, agents: agents, client: client, wake: make(chan struct{}, 1), log: log}
	look := func(_, to *corev1.Node) {
		if to == nil || !s.has(to) {
			return
		}
		select {
		case s.wake <- struct{}{}:
		default:
		}
	}
	if _, err := s.nodes.AddEventHandler(handler(look)); err != nil {
		return nil, fmt.Errorf("watching nodes: %w", err)
	}
	return s, nil
}

// has reports whether a node has the taint.
func (s *startup) has(n *corev1.Node) bool {
	return slices.ContainsFunc(n.Spec.Taints, func(t corev1.Taint) bool { return t.Key == s.taint })
}

// run takes the taint off, as agents get ready and nodes come, until ctx ends.
func (s *startup) run(ctx context.Context) error {
	said := ""
	for wait := minBackoff; ; {
		var again <-chan time.Time
		err := s.look(ctx)
		if err == nil {
			wait, said = minBackoff, ""
		} else {
			if ctx.Err() == nil && err.Error() != said {
				said = err.Error()
				s.log.Warn("start-up taint not taken off, will retry", "err", err)
			}
			again, wait = time.After(wait), min(2*wait, maxBackoff)
		}
		select {
		case <-s.agents.Changed():
		case <-s.wake:
		case <-again:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// look goes through all nodes once.
func (s *startup) look(ctx context.Context) error {
	var errs []error
	for _, o := range s.nodes.GetIndexer().List() {
		if n := o.(*corev1.Node); s.has(n) && s.ready(n.Name) {
			errs = append(errs, s.takeOff(ctx, n.Name))
		}
	}
	return errors.Join(errs...)
}

// ready reports whether the agent of a node has programmed the node's kernel, and is there.
func (s *startup) ready(node string) bool {
	r, ok := s.agents.Get(store.AgentKey(node))
	if !ok {
		return false
	}
	a, err := store.Decode[egress.Agent](r)
	return err == nil && a.Ready && !a.Restarting // one that cannot be read is reported by who reads them all
}

// takeOff takes the taint off one node, and leaves all others. The list of taints is written as a whole, on condition
// that the node has not changed meanwhile.
func (s *startup) takeOff(ctx context.Context, node string) error {
	ctx, cancel := context.WithTimeout(ctx, nodeTimeout)
	defer cancel()
	n, err := s.client.Nodes().Get(ctx, node, metav1.GetOptions{})
	if apierrors.IsNotFound(err) || err == nil && !s.has(n) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("reading node %s: %w", node, err)
	}
	left := slices.DeleteFunc(n.Spec.Taints, func(t corev1.Taint) bool { return t.Key == s.taint })
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"uid": n.UID, "resourceVersion": n.ResourceVersion},
		"spec":     map[string]any{"taints": left},
	})
	if err == nil {
		_, err = s.client.Nodes().Patch(ctx, node, types.MergePatchType, patch, metav1.PatchOptions{})
	}
	switch {
	case apierrors.IsForbidden(err):
		return fmt.Errorf("taking taint %s off node %s: %w: startupTaint of the chart gives it the right", s.taint, node, err)
	case apierrors.IsNotFound(err):
		return nil
	case err != nil:
		return fmt.Errorf("taking taint %s off node %s: %w", s.taint, node, err)
	}
	s.log.Info("start-up taint taken off", "node", node, "taint", s.taint)
	return nil
}
