from benchmarks.traffic import size, traffic

# Three trips of a sum, and slices and rows of a large array.
PROGRAM = """HloModule jit_f

%condition (arg: (s32[], f32[10,100])) -> pred[] {
  %arg = (s32[]{:T(128)}, f32[10,100]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %three = s32[]{:T(128)} constant(3)
  ROOT %less = pred[]{:T(512)} compare(%i, %three), direction=LT
}

%body (arg.1: (s32[], f32[10,100])) -> (s32[], f32[10,100]) {
  %arg.1 = (s32[]{:T(128)}, f32[10,100]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  %x = f32[10,100]{1,0:T(8,128)} get-tuple-element(%arg.1), index=1
  %fast = f32[10,100]{1,0:T(8,128)S(1)} fusion(%x), kind=kLoop, calls=%inner
  %y = f32[10,100]{1,0:T(8,128)} add(%x, %fast)
  ROOT %next = (s32[]{:T(128)}, f32[10,100]{1,0:T(8,128)}) tuple(%i.1, %y)
}

ENTRY %main (p: f32[10,100], big: f32[5000,128], where: s32[16]) -> f32[10,100] {
  %p = f32[10,100]{1,0:T(8,128)} parameter(0)
  %big = f32[5000,128]{1,0:T(8,128)} parameter(1)
  %where = s32[16]{0:T(128)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %rows = f32[16,128]{1,0:T(8,128)} gather(%big, %where), slice_sizes={1,128}
  %part = f32[8,128]{1,0:T(8,128)} dynamic-slice(%big, %zero, %zero), dynamic_slice_sizes={8,128}
  %start = (s32[]{:T(128)}, f32[10,100]{1,0:T(8,128)}) tuple(%zero, %p)
  %loop = (s32[]{:T(128)}, f32[10,100]{1,0:T(8,128)}) while(%start), condition=%condition, body=%body
  ROOT %out = f32[10,100]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


def test_sizes_fill_their_tiles_and_the_fast_memory_is_free():
    assert size("f32[10,100]{1,0:T(8,128)}") == 16 * 128 * 4
    assert size("f32[10,100]{0,1:T(8,128)}") == 104 * 128 * 4
    assert size("(bf16[3,5]{1,0}, s32[7]{0:T(128)S(1)})") == 3 * 5 * 2
    assert size("f32[]{:T(128)}") == 4


def test_a_loop_counts_as_often_as_it_runs_a_slice_as_a_slice_and_a_row_as_its_tile():
    array = 16 * 128 * 4
    assert traffic(PROGRAM) == 16 * 8 * 128 * 4 + array + 2 * 8 * 128 * 4 + 3 * (array + 2 * array)


# Three trips: a slice read and one written within a fused operation, rows of tables in either memory.
FUSED = """HloModule jit_g

%condition (arg: (s32[])) -> pred[] {
  %arg = (s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %three = s32[]{:T(128)} constant(3)
  ROOT %less = pred[]{:T(512)} compare(%i, %three), direction=LT
}

%inner (whole: f32[9,8,128]) -> f32[8,128] {
  %whole = f32[9,8,128]{2,1,0:T(8,128)} parameter(0)
  %one = s32[]{:T(128)} parameter(1)
  %flat = f32[72,128]{1,0:T(8,128)} bitcast(%whole)
  ROOT %slice = f32[8,128]{1,0:T(8,128)} dynamic-slice(%flat, %one, %one), dynamic_slice_sizes={8,128}
}

%fused (a: f32[9,8,128], b: f32[9,8,128], c: f32[8,128]) -> (f32[9,8,128], f32[8,128]) {
  %a = f32[9,8,128]{2,1,0:T(8,128)} parameter(0)
  %b = f32[9,8,128]{2,1,0:T(8,128)} parameter(1)
  %c = f32[8,128]{1,0:T(8,128)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %part = f32[8,128]{1,0:T(8,128)} fusion(%b, %zero), kind=kLoop, calls=%inner
  %sum = f32[8,128]{1,0:T(8,128)} add(%part, %c)
  %new = f32[1,8,128]{2,1,0:T(8,128)} bitcast(%sum)
  %update = f32[9,8,128]{2,1,0:T(8,128)} dynamic-update-slice(%a, %new, %zero, %zero, %zero)
  ROOT %both = (f32[9,8,128]{2,1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)}) tuple(%update, %sum)
}

%body (arg.1: (s32[])) -> (s32[]) {
  %arg.1 = (s32[]{:T(128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  %x = f32[9,8,128]{2,1,0:T(8,128)} constant({...})
  %y = f32[9,8,128]{2,1,0:T(8,128)} constant({...})
  %z = f32[8,128]{1,0:T(8,128)} constant({...})
  %where = s32[16]{0:T(128)S(1)} constant({...})
  %made = (f32[9,8,128]{2,1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)}) fusion(%x, %y, %z), kind=kLoop, calls=%fused
  %table = f32[5000,128]{1,0:T(8,128)} constant({...})
  %near = f32[5000,128]{1,0:T(8,128)S(1)} constant({...})
  %rows = f32[16,128]{1,0:T(8,128)S(1)} gather(%near, %where), slice_sizes={1,128}
  %added = f32[5000,128]{1,0:T(8,128)} scatter(%table, %where, %rows), to_apply=%add
  ROOT %next = (s32[]{:T(128)}) tuple(%i.1)
}

ENTRY %main (p: s32[]) -> (s32[]) {
  %p = s32[]{:T(128)} parameter(0)
  %start = (s32[]{:T(128)}) tuple(%p)
  ROOT %loop = (s32[]{:T(128)}) while(%start), condition=%condition, body=%body
}
"""


def test_a_fused_operation_reads_and_writes_its_slices_and_a_scatter_the_tiles_of_its_rows():
    tile = 8 * 128 * 4
    fused, added = (1 + 1) + (1 + 1), 2 * 16  # two slices read, one written in place and one as it is
    assert traffic(FUSED) == 3 * (fused + added) * tile
