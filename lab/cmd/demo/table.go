// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"text/tabwriter"

	authenticationv1 "k8s.io/api/authentication/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

// Values of the table's cells.
const (
	yes  = "yes"
	no   = "no"
	none = "-"
)

// answers are the API server's answers to a caller.
type answers struct {
	user   string
	groups string // without system:authenticated, which every caller has
	// Whether it let the caller list pods, delete one, and read secrets.
	list, remove, secrets string
}

// cells returns the answers in the order of the table's columns.
func (a answers) cells() []string {
	return []string{a.user, a.groups, a.list, a.remove, a.secrets}
}

// printTable asks the API server as each caller, prints its answers, and returns how
// many of them are wrong.
func printTable(ctx context.Context, l *lab.Lab) (wrong int, err error) {
	fmt.Println()
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "CALLER\tKIND\tUSER\tGROUPS\tLIST PODS\tDELETE A POD\tREAD SECRETS")
	for _, c := range callers {
		got, err := ask(ctx, l.Callers[c.Name])
		if err != nil {
			return wrong, fmt.Errorf("asking as %s: %w", c.Name, err)
		}
		cells, want := got.cells(), c.want.cells()
		for i := range cells {
			if cells[i] != want[i] {
				wrong++
				cells[i] += " (want " + want[i] + ")"
			}
		}
		fmt.Fprintf(w, "%s\t%s\t%s\n", c.Name, c.kind, strings.Join(cells, "\t"))
	}
	return wrong, w.Flush()
}

// ask asks the API server who the caller is and what it may do.
func ask(ctx context.Context, c *lab.Caller) (answers, error) {
	config, err := c.REST()
	if err != nil {
		return answers{}, err
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return answers{}, err
	}
	review, err := client.AuthenticationV1().SelfSubjectReviews().Create(ctx, &authenticationv1.SelfSubjectReview{}, metav1.CreateOptions{})
	if err != nil {
		return answers{}, fmt.Errorf("who am I: %w", err)
	}
	who := review.Status.UserInfo
	groups := slices.DeleteFunc(who.Groups, func(g string) bool { return g == "system:authenticated" })
	a := answers{user: who.Username, groups: none}
	if len(groups) > 0 {
		a.groups = strings.Join(groups, ",")
	}

	pods := client.CoreV1().Pods(metav1.NamespaceDefault)
	_, err = pods.List(ctx, metav1.ListOptions{})
	if a.list, err = allowed(err); err != nil {
		return answers{}, fmt.Errorf("listing pods: %w", err)
	}
	err = pods.Delete(ctx, lab.Pod, metav1.DeleteOptions{DryRun: []string{metav1.DryRunAll}})
	if a.remove, err = allowed(err); err != nil {
		return answers{}, fmt.Errorf("deleting a pod: %w", err)
	}
	_, err = client.CoreV1().Secrets(metav1.NamespaceDefault).List(ctx, metav1.ListOptions{})
	if a.secrets, err = allowed(err); err != nil {
		return answers{}, fmt.Errorf("reading secrets: %w", err)
	}
	return a, nil
}

// allowed turns the result of a request into a cell. It returns an error unless the
// request was answered or forbidden.
func allowed(err error) (string, error) {
	switch {
	case err == nil:
		return yes, nil
	case apierrors.IsForbidden(err):
		return no, nil
	}
	return "", err
}
