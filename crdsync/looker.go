package crdsync

import (
	"context"
	"fmt"
	"slices"

	authn "k8s.io/api/authentication/v1"
	authz "k8s.io/api/authorization/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// MayGet returns what asks the API server whether the bearer of a token has the verb get of a non-resource URL: who he
// is by a TokenReview, and what he may by a SubjectAccessReview. The role egret-crdsync-page allows both. The token has
// to be for the audience: one that is for the API server, like those that pods have, is none, also where an API server
// does not know of audiences and says nothing of them.
func MayGet(
	kube kubernetes.Interface, audience, url string,
) func(ctx context.Context, token string) (bool, error) {
	return func(ctx context.Context, token string) (bool, error) {
		ask := &authn.TokenReview{Spec: authn.TokenReviewSpec{Token: token, Audiences: []string{audience}}}
		who, err := kube.AuthenticationV1().TokenReviews().Create(ctx, ask, metav1.CreateOptions{})
		if err != nil {
			return false, fmt.Errorf("asking whose a token is: %w", err)
		}
		user := who.Status.User
		if !who.Status.Authenticated || user.Username == "" || !slices.Contains(who.Status.Audiences, audience) {
			return false, nil
		}
		extra := map[string]authz.ExtraValue{}
		for k, v := range user.Extra {
			extra[k] = authz.ExtraValue(v)
		}
		may, err := kube.AuthorizationV1().SubjectAccessReviews().Create(ctx, &authz.SubjectAccessReview{
			Spec: authz.SubjectAccessReviewSpec{
				User: user.Username, UID: user.UID, Groups: user.Groups, Extra: extra,
				NonResourceAttributes: &authz.NonResourceAttributes{Path: url, Verb: "get"},
			},
		}, metav1.CreateOptions{})
		if err != nil {
			return false, fmt.Errorf("asking what %s may: %w", user.Username, err)
		}
		return may.Status.Allowed, nil
	}
}
