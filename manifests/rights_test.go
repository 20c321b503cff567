package manifests_test

import (
	"maps"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/egret-project/egret/integration/lab"
	"github.com/egret-project/egret/manifests"
)

// Agents of a lab run with what the manifests give an agent, and with no more: so every test that has a lab shows that
// it is enough.
func TestAnAgentHasTheRightsOfThoseOfALab(t *testing.T) {
	pod := manifests.PodSpecs(t)["agent"]
	s := pod.Containers[0].SecurityContext
	added := func(what string, pod corev1.PodSpec, want []string) {
		t.Helper()
		var have []string
		for _, c := range pod.Containers[0].SecurityContext.Capabilities.Add {
			have = append(have, string(c))
		}
		slices.Sort(have)
		slices.Sort(want)
		if !slices.Equal(have, want) {
			t.Errorf("%s: capabilities %q, want %q, which are tried", what, have, want)
		}
	}
	usual := slices.Collect(maps.Keys(lab.AgentCapabilities))
	added("an agent", pod, slices.Clone(usual))
	added("with the fast path", manifests.PodsOf(t, "fast path")["agent"], slices.AppendSeq(usual, maps.Keys(lab.FastPathCapabilities)))
	if s.Privileged != nil && *s.Privileged {
		t.Error("the agent is privileged")
	}
	var host []string
	for _, v := range pod.Volumes {
		if v.HostPath != nil {
			host = append(host, v.HostPath.Path)
			i := slices.IndexFunc(pod.Containers[0].VolumeMounts, func(m corev1.VolumeMount) bool { return m.Name == v.Name && !m.ReadOnly })
			if i < 0 || !slices.Contains(pod.Containers[0].Args, "--sysctl-dir="+pod.Containers[0].VolumeMounts[i].MountPath) {
				t.Errorf("volume %s is not where the agent writes settings: %q", v.Name, pod.Containers[0].Args)
			}
		}
	}
	if !slices.Equal(host, []string{"/proc/sys/net"}) {
		t.Errorf("of the node it has %q, want the settings of its network alone", host)
	}
}

func TestNoPodHasMoreRightsThanItNeeds(t *testing.T) {
	pods := manifests.PodsOf(t, "AWS, bundled etcd")
	for _, command := range []string{"agent", "crdsync", "cloud", "credentials", "etcd-rbac", "run", "snapshot"} {
		pod, ok := pods[command]
		if !ok {
			t.Errorf("no pod runs %s", command)
			continue
		}
		for _, c := range pod.Containers {
			s := c.SecurityContext
			switch {
			case s == nil || s.Capabilities == nil || s.SeccompProfile == nil:
				t.Errorf("%s: nothing is said of its rights: %+v", command, s)
			case !slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) || len(s.Capabilities.Add) > 0 && command != "agent":
				t.Errorf("%s: capabilities %+v", command, s.Capabilities)
			case s.AllowPrivilegeEscalation == nil || *s.AllowPrivilegeEscalation || s.ReadOnlyRootFilesystem == nil || !*s.ReadOnlyRootFilesystem:
				t.Errorf("%s: it may gain privileges, or write to its root: %+v", command, s)
			case s.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault:
				t.Errorf("%s: seccomp is %s", command, s.SeccompProfile.Type)
			}
		}
	}
	for _, command := range []string{"crdsync", "cloud", "credentials", "etcd-rbac"} {
		if s := pods[command].Containers[0].SecurityContext; s.RunAsNonRoot == nil || !*s.RunAsNonRoot {
			t.Errorf("%s may run as root", command)
		}
	}
	// What an installation falls back to gives the agent all, and no mount of the node's files.
	pod := manifests.PodsOf(t, "bare")["agent"]
	if s := pod.Containers[0].SecurityContext; s.Privileged == nil || !*s.Privileged || slices.ContainsFunc(pod.Volumes, func(v corev1.Volume) bool { return v.HostPath != nil }) {
		t.Errorf("privileged: %+v with volumes %v", s, pod.Volumes)
	}
}
