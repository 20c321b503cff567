package manifests

import (
	"bytes"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
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

// No OpenShift is here: it is checked that each SCC gives what its pods ask for, and nothing that none of them asks
// for.
func TestOpenShiftGivesPodsWhatTheyAskForAndNoMore(t *testing.T) {
	t.Parallel()
	all := constraints(t)
	if _, ok := all["default"]; ok {
		t.Error("an SCC is for the service account that pods without one have")
	}
	pods := podsOf(decoded(t, variants["AWS, bundled etcd"]))
	if len(pods) != 7 {
		t.Errorf("%d pods, want those of the agent, crdsync, cloud, credentials, etcd, its roles and its snapshots", len(pods))
	}
	onVolumes := podsOf(decoded(t, variants["bundled etcd on volumes"]))["run"]
	for command, pod := range pods {
		s, ok := all[pod.ServiceAccountName]
		if !ok {
			t.Errorf("no SCC is for %q of %s", pod.ServiceAccountName, command)
			continue
		}
		first := slices.Contains([]string{"agent", "crdsync", "run"}, command) // who else has its SCC asks for less
		c := pod.Containers[0].SecurityContext
		var volumes []string
		if pod.AutomountServiceAccountToken == nil && command != "cloud" {
			volumes = append(volumes, "projected")
		}
		if command == "run" && slices.ContainsFunc(onVolumes.Volumes, isClaim) {
			volumes = append(volumes, "persistentVolumeClaim")
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
		if volumes = slices.Compact(volumes); first && !slices.Equal(volumes, s.Volumes) || !subset(volumes, s.Volumes) {
			t.Errorf("%s has volumes %q, may have %q", command, volumes, s.Volumes)
		}
		for what, pair := range map[string][2]any{
			"the node's network":   {pod.HostNetwork, s.AllowHostNetwork},
			"the node's files":     {slices.Contains(volumes, "hostPath"), s.AllowHostDirVolumePlugin},
			"ports of the node":    {slices.ContainsFunc(pod.Containers[0].Ports, isHostPort), s.AllowHostPorts},
			"the node's processes": {pod.HostPID || pod.HostIPC, s.AllowHostPID || s.AllowHostIPC},
			"more privileges":      {*c.AllowPrivilegeEscalation, s.AllowPrivilegeEscalation},
			"all privileges":       {c.Privileged != nil && *c.Privileged, s.AllowPrivilegedContainer},
			"a root to write to":   {!*c.ReadOnlyRootFilesystem, !s.ReadOnlyRootFilesystem},
			"capabilities":         {len(c.Capabilities.Add), len(s.AllowedCapabilities)},
		} {
			if pair[0] != pair[1] && (first || pair[0] == true) {
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
		if pod.SecurityContext == nil || pod.SecurityContext.FSGroup == nil {
			continue // OpenShift gives it the SCC's
		}
		if r := s.FSGroup.Ranges; s.FSGroup.Type == "MustRunAs" && (len(r) != 1 || r[0].Min != *pod.SecurityContext.FSGroup || r[0].Max != r[0].Min) {
			t.Errorf("%s: fsGroup %d, the SCC allows %+v", command, *pod.SecurityContext.FSGroup, s.FSGroup)
		}
	}
}

// isClaim is of the volumes that podsOf makes of claims: they have a name alone.
func isClaim(v corev1.Volume) bool { return v.VolumeSource == corev1.VolumeSource{} }

func isHostPort(p corev1.ContainerPort) bool { return p.HostPort != 0 }

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

// What is bound to an account, a role or an SCC of OpenShift, is all its pods': whatever else runs in the namespace has
// the account default.
func TestEachPodHasAServiceAccountOfItsOwn(t *testing.T) {
	t.Parallel()
	want := map[string]string{
		"agent": "egret-agent", "crdsync": "egret-crdsync", "cloud": "egret-cloud", "credentials": "egret-credentials",
		"run": "egret-etcd", "snapshot": "egret-etcd", "etcd-rbac": "egret-etcd-rbac",
	}
	for _, name := range []string{"as it comes", "bare", "bundled etcd", "bundled etcd on volumes", "AWS, bundled etcd"} {
		made, bound := map[string]bool{}, map[string]bool{}
		docs := decoded(t, variants[name])
		for _, d := range docs {
			var subjects []rbacv1.Subject
			switch o := d.object.(type) {
			case *corev1.ServiceAccount:
				made[o.Name] = o.AutomountServiceAccountToken == nil || *o.AutomountServiceAccountToken
			case *rbacv1.RoleBinding:
				subjects = o.Subjects
			case *rbacv1.ClusterRoleBinding:
				subjects = o.Subjects
			}
			for _, s := range subjects {
				bound[s.Name] = true
			}
		}
		for command, pod := range podsOf(docs) {
			account := pod.ServiceAccountName
			token, ok := made[account]
			if account != want[command] || !ok {
				t.Errorf("%s: %s has the account %q, want %q; it is made: %v", name, command, account, want[command], ok)
			}
			if token != bound[account] {
				t.Errorf("%s: account %s has a token: %v, has a role: %v", name, account, token, bound[account])
			}
		}
	}
}
