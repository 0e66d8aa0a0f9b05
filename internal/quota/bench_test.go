// SPDX-License-Identifier: Apache-2.0

package quota

import (
	"testing"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
)

// BenchmarkAdmit measures what is counted for a request, under the one lock of the budget:
// shared, as a process has it, and own, where each processor has a budget to itself. The
// difference is what requests wait for one another: run it with -cpu 1,2,4,8,16,32.
func BenchmarkAdmit(b *testing.B) {
	for _, tt := range []struct {
		name   string
		budget func(shared *Budget) *Budget
	}{
		{"shared", func(shared *Budget) *Budget { return shared }},
		{"own", func(*Budget) *Budget { return new(Budget) }},
	} {
		b.Run(tt.name, func(b *testing.B) {
			b.ReportAllocs()
			shared := new(Budget)
			defer proxytest.ReportCPU(b)()
			b.RunParallel(func(pb *testing.PB) {
				budget := tt.budget(shared)
				r, cancel := request(1, "/api/v1/namespaces/default/pods")
				defer cancel()
				r = r.WithContext(budget.ConnContext(r.Context(), nil))
				for pb.Next() {
					_, charge, err := budget.Admit(nil, r)
					charge.Close()
					if err != nil {
						b.Error(err)
						return
					}
				}
			})
		})
	}
}
