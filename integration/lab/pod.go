package lab

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation"
)

// PodConfig says what Pod makes.
type PodConfig struct {
	Name   string // namespace/name
	Node   string
	Labels map[string]string
}

// Pod makes a pod: its object and, when there is none, its namespace in the API; a network namespace with the lowest
// addresses that are free on the node; then its status, as a kubelet reports it. It returns when all of that is done,
// which is before Egret knows the pod. What a failed Pod made is removed again.
func (l *Lab) Pod(ctx context.Context, cfg PodConfig) (Pod, error) {
	namespace, name, err := splitPod(cfg.Name)
	if err != nil {
		return Pod{}, err
	}
	n, err := l.NodeNumber(cfg.Node)
	if err != nil {
		return Pod{}, err
	}
	p := Pod{Name: cfg.Name, Node: cfg.Node, Labels: cfg.Labels}
	err = l.change(ctx, func(s *state) error {
		if _, ok := s.Pods[p.Name]; ok {
			return fmt.Errorf("pod %s exists already", p.Name)
		}
		if s.Crashed[p.Node] {
			return fmt.Errorf("%s is powered off: recover it", p.Node)
		}
		if p.Number, err = freeNumber(s, p.Node); err != nil {
			return err
		}
		for _, f := range families() {
			p.IPs = append(p.IPs, f.podIP(n, p.Number))
		}
		if err := l.createPod(ctx, namespace, name, p); err != nil {
			return err
		}
		s.Pods[p.Name] = p
		err := l.write(s)
		if err == nil {
			err = l.makePod(ctx, namespace, name, p)
		}
		if err != nil {
			err = errors.Join(err, l.removePod(context.WithoutCancel(ctx), s, p))
		}
		return err
	})
	return p, err
}

func (l *Lab) makePod(ctx context.Context, namespace, name string, p Pod) error {
	h, err := l.newHost(podNetns(p.Name))
	if err != nil {
		return err
	}
	h.close()
	if err := l.attachPod(p); err != nil {
		return err
	}
	n, err := l.NodeNumber(p.Node)
	if err != nil {
		return err
	}
	return l.reportPod(ctx, namespace, name, p, NodeIP(n))
}

// RemovePod deletes a pod with grace 0, and its network namespace.
func (l *Lab) RemovePod(ctx context.Context, name string) error {
	return l.change(ctx, func(s *state) error {
		p, ok := s.Pods[name]
		if !ok {
			return fmt.Errorf("pod %q: lab %q has no such pod, want namespace/name", name, l.cfg.Name)
		}
		return l.removePod(ctx, s, p)
	})
}

func (l *Lab) removePod(ctx context.Context, s *state, p Pod) error {
	namespace, name, err := splitPod(p.Name)
	if err != nil {
		return err
	}
	if err := l.deletePod(ctx, namespace, name); err != nil {
		return err
	}
	if err := l.removeHost(podNetns(p.Name)); err != nil {
		return err
	}
	delete(s.Pods, p.Name)
	return l.write(s)
}

// splitPod checks namespace/name, as the API does, and that a file can be named after it.
func splitPod(pod string) (namespace, name string, err error) {
	namespace, name, ok := strings.Cut(pod, "/")
	if !ok || len(validation.IsDNS1123Label(namespace)) > 0 || len(validation.IsDNS1123Subdomain(name)) > 0 || len(pod) > 200 {
		return "", "", fmt.Errorf("pod %q: want namespace/name, lower-case letters, digits and dashes", pod)
	}
	return namespace, name, nil
}

// freeNumber returns the lowest number from 2 that no pod of the node has; 1 is the node's own.
func freeNumber(s *state, node string) (int, error) {
	used := map[int]bool{}
	for _, p := range s.Pods {
		if p.Node == node {
			used[p.Number] = true
		}
	}
	for n := 2; n < 255; n++ {
		if !used[n] {
			return n, nil
		}
	}
	return 0, fmt.Errorf("%s has no pod address left", node)
}
