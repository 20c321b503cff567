package manifests

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/yaml"

	"github.com/egret-project/egret/api/v1beta1"
)

// document is one object of a file.
type document struct {
	file   string
	object runtime.Object
}

// documents decodes every object of every file. Fields that the object's type does not have are errors.
func documents(t testing.TB) (out []document) {
	t.Helper()
	files, err := fs.Glob(FS, "*/*.yaml")
	if err != nil || len(files) < 8 {
		t.Fatalf("listing the manifests: %d files, %v", len(files), err)
	}
	for _, file := range files {
		b, err := FS.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, doc := range bytes.Split(b, []byte("\n---\n")) {
			out = append(out, decode(t, file, doc))
		}
	}
	return out
}

// scheme has the types of all objects that there are.
var scheme = sync.OnceValues(func() (*runtime.Scheme, error) {
	scheme := runtime.NewScheme()
	var errs []error
	for _, add := range []func(*runtime.Scheme) error{
		admissionregistrationv1.AddToScheme, appsv1.AddToScheme, batchv1.AddToScheme, policyv1.AddToScheme, corev1.AddToScheme, rbacv1.AddToScheme, apiextensionsv1.AddToScheme, v1beta1.AddToScheme,
	} {
		errs = append(errs, add(scheme))
	}
	return scheme, errors.Join(errs...)
})

func decode(t testing.TB, file string, doc []byte) document {
	t.Helper()
	types, err := scheme()
	if err != nil {
		t.Fatal(err)
	}
	var kind runtime.TypeMeta
	if err := yaml.Unmarshal(doc, &kind); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	o, err := types.New(kind.GroupVersionKind())
	if err != nil {
		t.Fatalf("%s: %v\n%s", file, err, doc)
	}
	if err := yaml.UnmarshalStrict(doc, o); err != nil {
		t.Errorf("%s: %s: %v", file, kind.Kind, err)
	}
	return document{file, o}
}

func TestGeneratedFilesAreThoseOfTheTypes(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	c := exec.Command("go", "tool", "controller-gen", "object", "crd", "paths=.", "output:dir="+dir)
	c.Dir = "../api/v1beta1"
	// as everything that is compiled without -race, whose packages it shares
	c.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("controller-gen: %v\n%s", err, out)
	}
	made, err := os.ReadDir(dir)
	if err != nil || len(made) != 3 {
		t.Fatalf("controller-gen made %d files, want 3: %v", len(made), err)
	}
	for _, e := range made {
		committed := filepath.Join("crds", e.Name())
		if filepath.Ext(e.Name()) == ".go" {
			committed = filepath.Join("../api/v1beta1", e.Name())
		}
		want, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(committed)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(string(want), string(got)); d != "" {
			t.Errorf("%s is not up to date, run `make generate` (-want +got):\n%s", committed, d)
		}
	}
}

func TestManifestsHaveNoUnknownField(t *testing.T) {
	var kinds []string
	for _, d := range documents(t) {
		kinds = append(kinds, d.object.GetObjectKind().GroupVersionKind().Kind)
	}
	slices.Sort(kinds)
	want := []string{
		"ClusterRole", "ClusterRole", "ClusterRole", "ClusterRole", "ClusterRoleBinding", "ClusterRoleBinding", "ConfigMap", "CustomResourceDefinition",
		"CustomResourceDefinition", "DaemonSet", "Deployment", "Egress", "Egress", "ExternalIPPool", "Namespace", "PodDisruptionBudget", "Role", "RoleBinding", "Service",
		"ServiceAccount", "ServiceAccount", "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding",
		"ValidatingAdmissionPolicyBinding", "ValidatingWebhookConfiguration",
	}
	if d := cmp.Diff(want, kinds); d != "" {
		t.Errorf("kinds (-want +got):\n%s", d)
	}
}

// podSpecs returns the pods that the manifests make, by the egret command that they run.
func podSpecs(t testing.TB) map[string]corev1.PodSpec {
	t.Helper()
	return podsOf(documents(t))
}

func podsOf(docs []document) map[string]corev1.PodSpec {
	out := map[string]corev1.PodSpec{}
	for _, d := range docs {
		var s corev1.PodSpec
		switch o := d.object.(type) {
		case *appsv1.DaemonSet:
			s = o.Spec.Template.Spec
		case *appsv1.Deployment:
			s = o.Spec.Template.Spec
		case *appsv1.StatefulSet:
			s = o.Spec.Template.Spec
			for _, claim := range o.Spec.VolumeClaimTemplates {
				s.Volumes = append(s.Volumes, corev1.Volume{Name: claim.Name})
			}
		case *batchv1.CronJob:
			s = o.Spec.JobTemplate.Spec.Template.Spec
		default:
			continue
		}
		out[s.Containers[0].Args[0]] = s
	}
	return out
}

func TestAgentsHaveNoWayToTheKubernetesAPI(t *testing.T) {
	s := podSpecs(t)["agent"]
	if s.AutomountServiceAccountToken == nil || *s.AutomountServiceAccountToken {
		t.Error("the agent has a service account token")
	}
	if !s.HostNetwork {
		t.Error("the agent is not in the node's network")
	}
}

func TestVariablesInArgumentsAreDefined(t *testing.T) {
	for name, s := range podSpecs(t) {
		var env []string
		for _, e := range s.Containers[0].Env {
			env = append(env, e.Name)
		}
		for _, arg := range s.Containers[0].Args {
			for _, m := range regexp.MustCompile(`\$\((\w+)\)`).FindAllStringSubmatch(arg, -1) {
				if !slices.Contains(env, m[1]) {
					t.Errorf("%s: argument %s: no variable %s", name, arg, m[1])
				}
			}
		}
	}
}

func TestFlagsInManifestsExist(t *testing.T) {
	t.Parallel()
	bin := egret(t)
	for name, s := range podSpecs(t) {
		help, err := exec.Command(bin, name, "--help").CombinedOutput()
		if err != nil {
			t.Fatalf("egret %s --help: %v", name, err)
		}
		for _, arg := range s.Containers[0].Args[1:] {
			flag, _, _ := strings.Cut(arg, "=")
			if !regexp.MustCompile(`(?m)^\s+(-\w, )?` + regexp.QuoteMeta(flag) + `\s`).Match(help) {
				t.Errorf("egret %s has no flag %s", name, flag)
			}
		}
	}
}

func TestTheNamespaceComesFirst(t *testing.T) {
	// kubectl apply -f deploy goes by the names of the files.
	files, err := fs.Glob(FS, "deploy/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	b, err := FS.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	first, _, _ := strings.Cut(string(b), "\n---\n")
	if !strings.Contains(first, "kind: Namespace") {
		t.Errorf("%s does not begin with the namespace of all others", files[0])
	}
}
