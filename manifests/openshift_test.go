package manifests

import (
	"bytes"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"
)

// scc is OpenShift's SecurityContextConstraints, as far as the manifests use it (security.openshift.io/v1).
type scc struct {
	metav1.TypeMeta
	Metadata                                               metav1.ObjectMeta
	AllowHostDirVolumePlugin, AllowHostIPC, AllowHostPID   bool
	AllowHostNetwork, AllowHostPorts                       bool
	AllowPrivilegeEscalation, AllowPrivilegedContainer     bool
	AllowedCapabilities, RequiredDropCapabilities          []corev1.Capability
	DefaultAddCapabilities                                 []corev1.Capability
	ReadOnlyRootFilesystem                                 bool
	RunAsUser, FSGroup, SupplementalGroups, SELinuxContext struct {
		Type   string
		UID    *int64
		Ranges []struct{ Min, Max int64 }
	}
	SeccompProfiles, Volumes, Users, Groups []string
}

// constraints reads the SCCs by the service accounts that have them.
func constraints(t *testing.T) map[string]scc {
	t.Helper()
	b, err := os.ReadFile("examples/openshift/scc.yaml")
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]scc{}
	for _, doc := range bytes.Split(b, []byte("\n---\n")) {
		var s scc
		if err := yaml.UnmarshalStrict(doc, &s); err != nil {
			t.Fatal(err)
		}
		for _, u := range s.Users {
			out[strings.TrimPrefix(u, "system:serviceaccount:egret-system:")] = s
		}
	}
	return out
}

// No OpenShift is here: it is checked that each SCC gives what its pod asks for, and nothing that the pod does not
// ask for.
func TestOpenShiftGivesPodsWhatTheyAskForAndNoMore(t *testing.T) {
	t.Parallel()
	all := constraints(t)
	pods := podsOf(decoded(t, variants["AWS"]))
	for _, command := range []string{"agent", "crdsync", "cloud"} {
		pod, ok := pods[command]
		if !ok {
			t.Errorf("no pod runs %s", command)
			continue
		}
		account := pod.ServiceAccountName
		if account == "" {
			account = "default"
		}
		s, ok := all[account]
		if !ok {
			t.Errorf("no SCC is for %s of %s", account, command)
			continue
		}
		c := pod.Containers[0].SecurityContext
		var volumes []string
		if pod.AutomountServiceAccountToken == nil && account != "egret-cloud" {
			volumes = append(volumes, "projected")
		}
		for _, v := range pod.Volumes {
			switch {
			case v.ConfigMap != nil:
				volumes = append(volumes, "configMap")
			case v.Secret != nil:
				volumes = append(volumes, "secret")
			case v.HostPath != nil:
				volumes = append(volumes, "hostPath")
			}
		}
		slices.Sort(volumes)
		if volumes = slices.Compact(volumes); command != "cloud" && !slices.Equal(volumes, s.Volumes) || !subset(volumes, s.Volumes) {
			t.Errorf("%s has volumes %q, may have %q", command, volumes, s.Volumes)
		}
		for what, pair := range map[string][2]any{
			"the node's network":     {pod.HostNetwork, s.AllowHostNetwork},
			"the node's files":       {slices.Contains(volumes, "hostPath"), s.AllowHostDirVolumePlugin},
			"ports of the node":      {len(pod.Containers[0].Ports) > 0, s.AllowHostPorts},
			"the node's processes":   {pod.HostPID || pod.HostIPC, s.AllowHostPID || s.AllowHostIPC},
			"more privileges":        {*c.AllowPrivilegeEscalation, s.AllowPrivilegeEscalation},
			"all privileges":         {c.Privileged != nil && *c.Privileged, s.AllowPrivilegedContainer},
			"a root that is not its": {*c.ReadOnlyRootFilesystem, s.ReadOnlyRootFilesystem},
			"capabilities":           {len(c.Capabilities.Add), len(s.AllowedCapabilities)},
		} {
			if pair[0] != pair[1] {
				t.Errorf("%s, %s: the pod asks for %v, the SCC allows %v", command, what, pair[0], pair[1])
			}
		}
		if !subset(c.Capabilities.Add, s.AllowedCapabilities) || !subset(s.RequiredDropCapabilities, c.Capabilities.Drop) {
			t.Errorf("%s: capabilities %+v, the SCC allows %q and drops %q", command, c.Capabilities, s.AllowedCapabilities, s.RequiredDropCapabilities)
		}
		if want := "runtime/default"; c.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault || !slices.Equal(s.SeccompProfiles, []string{want}) {
			t.Errorf("%s: seccomp profile %v, the SCC allows %q", command, c.SeccompProfile, s.SeccompProfiles)
		}
		if s.RunAsUser.Type != "RunAsAny" && (s.RunAsUser.UID == nil || *s.RunAsUser.UID != *c.RunAsUser) || s.RunAsUser.Type == "RunAsAny" && *c.RunAsUser != 0 {
			t.Errorf("%s: user %d, the SCC allows %+v", command, *c.RunAsUser, s.RunAsUser)
		}
		if r := s.FSGroup.Ranges; s.FSGroup.Type == "MustRunAs" && (len(r) != 1 || r[0].Min != *pod.SecurityContext.FSGroup || r[0].Max != r[0].Min) {
			t.Errorf("%s: fsGroup %d, the SCC allows %+v", command, *pod.SecurityContext.FSGroup, s.FSGroup)
		}
	}
}

func subset[T comparable](a, b []T) bool {
	return !slices.ContainsFunc(a, func(v T) bool { return !slices.Contains(b, v) })
}

// It is the guide's, for the nodes that the guide's pools of other subnets are on.
func TestTheTunedObjectIsTheGuides(t *testing.T) {
	t.Parallel()
	var tuned struct {
		metav1.TypeMeta
		Metadata metav1.ObjectMeta
		Spec     struct {
			Profile   []struct{ Name, Data string }
			Recommend []struct {
				Match    []struct{ Label, Value string }
				Priority int
				Profile  string
			}
		}
	}
	read(t, "examples/openshift/tuned.yaml", &tuned)
	for _, r := range tuned.Spec.Recommend {
		labels := map[string]string{}
		for _, m := range r.Match {
			labels[m.Label] = m.Value
		}
		if d := cmp.Diff(map[string]string{"network-role": "egress-gateway"}, labels); d != "" {
			t.Errorf("nodes (-want +got):\n%s", d)
		}
		if r.Profile != tuned.Spec.Profile[0].Name {
			t.Errorf("profile %q is recommended, %q is there", r.Profile, tuned.Spec.Profile[0].Name)
		}
	}
	if len(tuned.Spec.Recommend) != 1 || !strings.Contains(tuned.Spec.Profile[0].Data, "[sysctl]\nnet.ipv4.conf.all.rp_filter=2\n") {
		t.Errorf("%+v", tuned.Spec)
	}
}
