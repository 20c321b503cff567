package manifests_test

import (
	"os"
	"strings"
	"testing"

	authorizationv1 "k8s.io/api/authorization/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"sigs.k8s.io/yaml"

	"github.com/egret-project/egret/internal/kubetest"
)

// The API server is asked what users with the roles may do. That Kubernetes adds the rules to its own roles is the
// controller-manager's doing.
func TestRolesToViewAndToEditEgressesAllowThatAlone(t *testing.T) {
	t.Parallel()
	kube, err := kubernetes.NewForConfig(kubetest.New(t))
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile("deploy/roles.yaml")
	if err != nil {
		t.Fatal(err)
	}
	addedTo := map[string]string{}
	for _, doc := range strings.Split(string(b), "\n---\n") {
		var r rbacv1.ClusterRole
		if err := yaml.UnmarshalStrict([]byte(doc), &r); err != nil {
			t.Fatal(err)
		}
		for label := range r.Labels {
			addedTo[r.Name] = strings.TrimPrefix(label, "rbac.authorization.k8s.io/aggregate-to-")
		}
		if _, err := kube.RbacV1().ClusterRoles().Create(t.Context(), &r, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		bind := &rbacv1.ClusterRoleBinding{
			ObjectMeta: metav1.ObjectMeta{Name: r.Name}, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: r.Name},
			Subjects: []rbacv1.Subject{{Kind: rbacv1.UserKind, APIGroup: rbacv1.GroupName, Name: r.Name}},
		}
		if _, err := kube.RbacV1().ClusterRoleBindings().Create(t.Context(), bind, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if addedTo["egret-view"] != "view" || addedTo["egret-edit"] != "admin" || len(addedTo) != 2 {
		t.Errorf("the roles are added to %v, want egret-view to view, egret-edit to admin: who has edit must not give out egress IPs", addedTo)
	}
	for _, tt := range []struct {
		user, verb, resource, subresource string
		want                              bool
	}{
		{"egret-view", "list", "egresses", "", true},
		{"egret-view", "watch", "externalippools", "", true},
		{"egret-view", "create", "egresses", "", false},
		{"egret-view", "update", "externalippools", "", false},
		{"egret-edit", "create", "egresses", "", true},
		{"egret-edit", "delete", "externalippools", "", true},
		{"egret-edit", "update", "egresses", "status", false}, // which crdsync alone writes
		{"nobody", "list", "egresses", "", false},
	} {
		review := &authorizationv1.SubjectAccessReview{Spec: authorizationv1.SubjectAccessReviewSpec{
			User:               tt.user,
			ResourceAttributes: &authorizationv1.ResourceAttributes{Group: "crd.antrea.io", Verb: tt.verb, Resource: tt.resource, Subresource: tt.subresource},
		}}
		var got bool
		for range 100 { // the server sees new roles by a watch of its own
			answer, err := kube.AuthorizationV1().SubjectAccessReviews().Create(t.Context(), review, metav1.CreateOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if got = answer.Status.Allowed; got == tt.want {
				break
			}
		}
		if got != tt.want {
			t.Errorf("%s may %s %s %s: %t, want %t", tt.user, tt.verb, tt.resource, tt.subresource, got, tt.want)
		}
	}
}
