package lab

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// kube runs f with a client of the API server.
func (l *Lab) kube(f func(*kubernetes.Clientset) error) error {
	c, err := kubernetes.NewForConfig(l.cluster.rest())
	if err != nil {
		return fmt.Errorf("making a client of the API server: %w", err)
	}
	return f(c)
}

// createNodes creates the Node objects of all nodes.
func (l *Lab) createNodes(ctx context.Context) error {
	for _, n := range l.nodes() {
		if err := l.RegisterNode(ctx, NodeName(n)); err != nil {
			return err
		}
	}
	return nil
}

// RegisterNode creates the Node object of a node, as its kubelet does.
func (l *Lab) RegisterNode(ctx context.Context, name string) error {
	n, err := l.NodeNumber(name)
	if err != nil {
		return err
	}
	node := &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{corev1.LabelHostname: name, corev1.LabelOSStable: "linux"}},
		Status: corev1.NodeStatus{
			Addresses: []corev1.NodeAddress{{Type: corev1.NodeHostName, Address: name}},
			Conditions: []corev1.NodeCondition{{
				Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "KubeletReady", Message: "the lab has no kubelet",
				LastHeartbeatTime: metav1.Now(), LastTransitionTime: metav1.Now(),
			}},
		},
	}
	if l.cfg.Kubelet { // it says itself how it is
		node.Status = corev1.NodeStatus{}
	}
	for _, f := range families() {
		if n > l.cfg.WithoutPodCIDRs {
			node.Spec.PodCIDRs = append(node.Spec.PodCIDRs, f.podCIDR(n).String())
			node.Spec.PodCIDR = node.Spec.PodCIDRs[0]
		}
		if l.cfg.Kubelet || l.cfg.IPv6Nodes && f.node(n).Is4() {
			continue
		}
		node.Status.Addresses = append(node.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: f.node(n).String()})
	}
	return l.kube(func(c *kubernetes.Clientset) error {
		if _, err := c.CoreV1().Nodes().Create(ctx, node, metav1.CreateOptions{}); err != nil {
			return fmt.Errorf("creating node %s: %w", name, err)
		}
		return nil
	})
}

// createPod creates the Pod object, and its namespace when there is none.
func (l *Lab) createPod(ctx context.Context, namespace, name string, p Pod) error {
	return l.kube(func(c *kubernetes.Clientset) error {
		ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}
		if _, err := c.CoreV1().Namespaces().Create(ctx, ns, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
			return fmt.Errorf("creating namespace %s: %w", namespace, err)
		}
		pod := &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: p.Labels},
			Spec: corev1.PodSpec{
				NodeName:   p.Node,
				Containers: []corev1.Container{{Name: "main", Image: "lab.invalid/network-namespace"}},
			},
		}
		if _, err := c.CoreV1().Pods(namespace).Create(ctx, pod, metav1.CreateOptions{}); err != nil {
			return fmt.Errorf("creating pod %s: %w", p.Name, err)
		}
		return nil
	})
}

// reportPod sets the pod's status as a kubelet does once the pod runs.
func (l *Lab) reportPod(ctx context.Context, namespace, name string, p Pod, hostIP netip.Addr) error {
	now := metav1.NewTime(time.Now())
	return l.kube(func(c *kubernetes.Clientset) error {
		pod, err := c.CoreV1().Pods(namespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return fmt.Errorf("reading pod %s: %w", p.Name, err)
		}
		pod.Status = corev1.PodStatus{
			Phase: corev1.PodRunning, StartTime: &now,
			HostIP: hostIP.String(), HostIPs: []corev1.HostIP{{IP: hostIP.String()}}, PodIP: p.IPs[0].String(),
			ContainerStatuses: []corev1.ContainerStatus{{
				Name: "main", Image: pod.Spec.Containers[0].Image, Ready: true,
				State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: now}},
			}},
		}
		for _, ip := range p.IPs {
			pod.Status.PodIPs = append(pod.Status.PodIPs, corev1.PodIP{IP: ip.String()})
		}
		for _, t := range []corev1.PodConditionType{corev1.PodScheduled, corev1.PodInitialized, corev1.ContainersReady, corev1.PodReady} {
			pod.Status.Conditions = append(pod.Status.Conditions, corev1.PodCondition{Type: t, Status: corev1.ConditionTrue, LastTransitionTime: now})
		}
		if _, err := c.CoreV1().Pods(namespace).UpdateStatus(ctx, pod, metav1.UpdateOptions{}); err != nil {
			return fmt.Errorf("writing the status of pod %s: %w", p.Name, err)
		}
		return nil
	})
}

// deletePod deletes the Pod object at once. Nil when there is none.
func (l *Lab) deletePod(ctx context.Context, namespace, name string) error {
	return l.kube(func(c *kubernetes.Clientset) error {
		var now int64
		err := c.CoreV1().Pods(namespace).Delete(ctx, name, metav1.DeleteOptions{GracePeriodSeconds: &now})
		if err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("deleting pod %s/%s: %w", namespace, name, err)
		}
		return nil
	})
}
